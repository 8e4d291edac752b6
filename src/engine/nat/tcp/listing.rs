//! TCP flows as they are shown, and ended by who looks at them.

use super::flow::{Fate, State};
use super::{Flow, Key, Moved, TcpTable};
use crate::engine::core::Core;
use crate::engine::flows::{Began, Carried, FlowId, FlowNews, FlowProtocol, FlowView, Table, Walk};
use crate::engine::guest_port::GuestPort;
use crate::engine::host_net::{HostStream, Token};
use crate::time::Instant;

impl State {
    const fn word(self) -> &'static str {
        match self {
            State::Connecting => "connecting",
            State::SynSent => "syn_sent",
            State::SynReceived => "syn_received",
            State::Established => "established",
            State::TimeWait => "time_wait",
        }
    }
}

fn view<S>(flow: &Flow<S>, now: Instant) -> FlowView {
    FlowView {
        id: FlowId(flow.token.0),
        protocol: FlowProtocol::Tcp,
        guest: flow.key.guest,
        remote: flow.key.remote,
        state: flow.state.word(),
        began: Some(if flow.from_world { Began::World } else { Began::Guest }),
        idle: now.since(flow.last_active),
        carried: Some(flow.carried),
    }
}

impl<S: HostStream> TcpTable<S> {
    /// Shows flows to a walk.
    pub fn list(&self, walk: &mut Walk<'_>) {
        let now = walk.now;
        let show = |place| self.flows.get(place).map(|flow| view(flow, now));
        walk.over(Table::Tcp, self.flows.capacity(), show);
    }

    /// Ends a flow; both sides see RST. False if there is none of this name.
    pub fn end(&mut self, core: &mut Core, port: &mut impl GuestPort, id: FlowId) -> bool {
        let Some(at) = self.find(Token(id.0)) else { return false };
        self.settle(core, port, at, Fate::ResetBoth);
        true
    }

    /// Tells of the end of a flow that was lost on its way from another worker.
    pub fn note_lost(core: &mut Core, moved: &Moved<S::Detached>) {
        Self::note_flow(core, false, &moved.key, moved.carried);
    }

    /// Notes a flow that began or ended, for who listens.
    pub(super) fn note_flow(core: &mut Core, opened: bool, key: &Key, carried: Carried) {
        let (guest, remote) = (key.guest, key.remote);
        let carried = (!opened).then_some(carried);
        core.flow_news.note(|| FlowNews { opened, protocol: FlowProtocol::Tcp, guest, remote, carried });
    }
}
