//! What the control thread asks of a worker, and what the worker tells unasked.
//!
//! May touch: the worker's parts, between two batches.

use std::io;

use socket2::Socket;

use super::Worker;
use crate::config::Publish;
use crate::control::events::{Event, Events};
use crate::device::DeviceEvent;
use crate::engine::core::Owner;
use crate::engine::flows::{Ended, FlowId, FlowPage, FlowQuery, NewsList, Table, Walk};
use crate::engine::packet::PacketNat;
use crate::requests::{Request, RequestBox, RingReport, WorkerReport};
use crate::time::Instant;

/// Both, of one worker.
#[derive(Debug)]
pub(super) struct Requests {
    asked: RequestBox,
    events: Events,
    /// Tells what all workers see.
    tells: bool,
    attached: bool,
    flows_told: bool,
}

impl Requests {
    pub(super) fn new(asked: RequestBox, events: Events, tells: bool) -> Requests {
        Requests { asked, events, tells, attached: false, flows_told: false }
    }

    /// Takes note of what happened to the device.
    pub(super) fn saw(&mut self, event: DeviceEvent) {
        let news = match event {
            DeviceEvent::Attached => Event::Attached,
            DeviceEvent::Detached => Event::Detached,
            DeviceEvent::GuestReset => Event::GuestReset,
            _ => return,
        };
        match event {
            DeviceEvent::Attached => self.attached = true,
            DeviceEvent::Detached => self.attached = false,
            _ => {}
        }
        if self.tells {
            self.events.tell(news);
        }
    }
}

impl Worker {
    /// Answers what waits. Who asked and is gone is no matter.
    pub(super) fn answer_requests(&mut self, now: Instant) {
        while let Some(request) = self.requests.asked.take() {
            match request {
                Request::Report(answer) => {
                    // Who just began to listen to flows asks too.
                    self.tell_flows();
                    let _ = answer.send(self.report());
                }
                Request::Flows(query, answer) => {
                    let _ = answer.send(self.flows(now, &query));
                }
                Request::EndFlow(id, answer) => {
                    let _ = answer.send(self.end_flow(now, id));
                }
                Request::Drain(answer) => {
                    self.engine.drain();
                    if let Some(nat) = self.packet_nat() {
                        nat.drain();
                    }
                    let _ = answer.send(());
                }
                Request::Record(recorder, answer) => {
                    // None is begun that was given up meanwhile.
                    if recorder.is_none() || !answer.is_closed() {
                        let _ = answer.send(self.queues.set_recorder(recorder));
                    }
                }
                Request::Wake(answer) => {
                    let _ = answer.send(());
                }
                Request::Publish(port, socket, answer) => {
                    // Who gave up would not know of it.
                    if !answer.is_closed() {
                        let _ = answer.send(self.publish(now, port, socket));
                    }
                }
                Request::Unpublish { port, reset, answer } => {
                    let _ = answer.send(self.unpublish(now, &port, reset));
                }
                Request::EndPublished { port, first, answer } => {
                    let _ = answer.send(self.end_published(now, &port, first));
                }
            }
        }
    }

    /// Serves a published port, or knows that another worker does. False if a flow of the guest has it.
    fn publish(&mut self, now: Instant, port: Publish, socket: Option<Socket>) -> io::Result<bool> {
        if let Some(published) = self.link.as_mut().and_then(|link| link.publish(now, port)) {
            return Ok(published);
        }
        match socket {
            Some(socket) => super::publish(&mut self.engine, Owner::TheGuest, port, socket)?,
            None => self.engine.note_published(port),
        }
        Ok(true)
    }

    /// Ends more connections of a port it serves no more.
    fn end_published(&mut self, now: Instant, port: &Publish, first: usize) -> Ended {
        if let Some(nat) = self.packet_nat() {
            return nat.end_published(port.protocol, port.host.port(), first);
        }
        let (_, rx) = self.queues.split();
        self.engine.reset_published(now, rx, port, first)
    }

    /// Serves it no more; the first step of ending its connections.
    fn unpublish(&mut self, now: Instant, port: &Publish, reset: bool) -> Ended {
        if let Some(ended) = self.link.as_mut().and_then(|link| link.unpublish(now, port, reset)) {
            return ended;
        }
        let (_, rx) = self.queues.split();
        self.engine.unpublish(now, rx, (Owner::TheGuest, port), reset)
    }

    /// Translation of packets, if they are translated.
    fn packet_nat(&mut self) -> Option<&mut PacketNat> {
        self.link.as_mut().and_then(super::LinkEnd::nat)
    }

    fn report(&mut self) -> WorkerReport {
        let translated = self.packet_nat().map_or(0, |nat| nat.table().len());
        let rings = self.queues.rings().map(|(index, size, available)| RingReport { index, size, available });
        WorkerReport {
            attached: self.requests.attached,
            features: self.queues.features(),
            rings: rings.collect(),
            counters: self.counters(),
            device: *self.queues.stats(),
            measures: self.measures,
            flows: (self.engine.flows() + translated) as u64,
        }
    }

    fn flows(&mut self, now: Instant, query: &FlowQuery) -> FlowPage {
        let mut walk = Walk::new(query, now);
        self.engine.list_flows(&mut walk);
        if let Some(nat) = self.packet_nat() {
            nat.list(&mut walk);
        }
        walk.done()
    }

    fn end_flow(&mut self, now: Instant, id: FlowId) -> bool {
        if id.table() == Some(Table::Packet) {
            return self.packet_nat().is_some_and(|nat| nat.end(id));
        }
        let (_, rx) = self.queues.split();
        self.engine.end_flow(now, rx, id)
    }

    /// Tells of flows that began or ended in this batch, to who wants to hear of each.
    pub(super) fn tell_flows(&mut self) {
        let wanted = self.requests.events.flows_wanted();
        if !wanted && !self.requests.flows_told {
            return;
        }
        self.requests.flows_told = wanted;
        let nat = self.link.as_mut().and_then(super::LinkEnd::nat);
        let lists = [Some(self.engine.flow_news()), nat.map(PacketNat::flow_news)];
        for list in lists.into_iter().flatten() {
            tell(&self.requests.events, list, wanted);
        }
    }
}

fn tell(events: &Events, list: &mut NewsList, wanted: bool) {
    let (noted, missed) = list.take();
    for flow in noted {
        events.tell(flow.into());
    }
    if missed > 0 {
        events.tell(Event::FlowsMissed { count: missed });
    }
    list.set(wanted);
}
