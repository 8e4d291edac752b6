//! Published ports in the life of the process: bound at the start, served until its end, and changed meanwhile.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use socket2::Socket;

use super::{Error, starting};
use crate::config::{Config, Mode, Publish, StationAddress};
use crate::control::events::Events;
use crate::control::network_watch::SharedJoined;
use crate::control::port_relay::{GuestAddress, Relay};
use crate::control::ports::{Ports, Way};
use crate::holder::tenant::Lender;
use crate::requests::WorkerHandle;
use crate::uplink::published;

/// Published ports with their sockets.
pub(super) type Bound = Vec<(Publish, Socket)>;

/// What is published at the start.
#[derive(Default)]
pub(super) struct AtStart {
    /// All of it, wherever it is served.
    pub(super) ports: Vec<Publish>,
    /// Those of them that no worker serves, because the kernel translates.
    pub(super) relayed: Bound,
}

/// What settings publish, before ports are picked. Of those a holder serves there is nothing to change.
pub(super) fn asked(mode: &Mode) -> Vec<Publish> {
    match mode {
        Mode::Nat(nat) => nat.publish.clone(),
        Mode::Isolated => Vec::new(),
    }
}

/// Binds every published port; port 0 is picked by the kernel, reported and put in its place.
pub(super) fn bind_all(publish: &mut [Publish]) -> Result<Bound, Error> {
    let each = |port: &mut Publish| {
        let socket = bind(port)?;
        Ok((*port, socket))
    };
    publish.iter_mut().map(each).collect()
}

/// Binds one published port, which must be a free one.
pub(super) fn bind(port: &mut Publish) -> Result<Socket, Error> {
    let socket = published::bind(port)?;
    tracing::info!(kind = port.protocol.name(), host = %port.host, guest_port = port.guest_port, "published");
    Ok(socket)
}

/// Who is to serve published ports.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// Nobody, for this reason.
    Nowhere(&'static str),
    /// Workers, by sockets of this host.
    Workers,
    /// Workers, at the address on a link; none while DHCP leases it.
    Link(Option<Ipv4Addr>),
    /// The host's kernel.
    Kernel,
    /// The holder of a rootless network, which is asked by this way.
    Holder(Lender),
}

/// Where published ports of `config` are served; `held` says of a network with a holder whether that leads to the world, and
/// by which way it is asked.
pub(super) fn place(config: &Config, held: Option<(bool, Lender)>) -> Place {
    let translated = config.link.as_ref().and_then(|link| link.translate.as_ref());
    let is_nat = matches!(config.mode, Mode::Nat(_));
    match (translated.map(|translate| translate.address), &config.network) {
        (None, Some(network)) if let Some((world, lender)) = held => match world {
            false => Place::Nowhere("guests of this network are reached by each other only"),
            true if network.trust_guest && config.lan.guest.is_none() => Place::Nowhere(
                "with --trust-guest nothing says which of the guest's addresses a port leads to: start with --guest-ip IP",
            ),
            true => Place::Holder(lender),
        },
        (Some(StationAddress::Fixed(held)), _) => Place::Link(Some(held.addr)),
        (Some(StationAddress::Dhcp), _) => Place::Link(None),
        (None, Some(_)) if is_nat => Place::Kernel,
        (None, Some(_)) => Place::Nowhere("no port of this host leads to guests of this network"),
        (None, None) if is_nat => Place::Workers,
        (None, None) if config.link.is_some() => {
            Place::Nowhere("with --mode bridge the guest has an address of its own, which others reach")
        }
        (None, None) => Place::Nowhere("with this --mode no port of this host leads to the guest"),
    }
}

impl Place {
    /// With those who serve there.
    pub(super) fn with(
        self,
        workers: Vec<WorkerHandle>,
        membership: Option<(&SharedJoined, GuestAddress)>,
    ) -> Way {
        match (self, membership) {
            (Place::Workers, _) => Way::Workers(workers),
            (Place::Link(held), _) => Way::Link(workers, held),
            (Place::Kernel, Some((joined, guest))) => Way::Kernel(joined.clone(), guest),
            (Place::Nowhere(why), _) => Way::None(why),
            (Place::Holder(lender), Some((joined, _))) => Way::Holder(joined.clone(), lender),
            // A kernel's and a holder's are those of a network.
            (Place::Holder(_) | Place::Kernel, None) => Way::None("this process is on no network"),
        }
    }
}

/// Serves from now on, on the runtime this is called on, what no worker does.
pub(super) fn serve(
    way: Way,
    events: Events,
    AtStart { ports, relayed }: AtStart,
    guest: &GuestAddress,
) -> Result<Ports, Error> {
    let mut served: Vec<(Publish, Option<Relay>)> = Vec::with_capacity(ports.len());
    let own: HashSet<Publish> = relayed.iter().map(|(port, _)| *port).collect();
    let of_others = ports.into_iter().filter(|port| !own.contains(port));
    served.extend(of_others.map(|port| (port, None)));
    for (port, socket) in relayed {
        let relay =
            Relay::new(socket, guest.clone(), &port).map_err(starting("the relay of a published port"))?;
        served.push((port, Some(relay)));
    }
    Ok(Ports::new(way, events, served))
}
