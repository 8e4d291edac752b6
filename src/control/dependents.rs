//! Who depends on the host's network, and what each does when it changes.
//!
//! | change | resolver | DHCP | workers |
//! |---|---|---|---|
//! | `resolv.conf` | other upstreams, answers forgotten | another search list | |
//! | links, addresses, routes, rules | answers and health forgotten, questions begin anew | | new flows take the new way by themselves |
//! | an address went for good | | | flows that came from it end |
//!
//! Flows that can live do: the kernel looks for the way of each packet anew, and datagram sockets, which are
//! bound to no address, leave from the new one.

use std::sync::{Arc, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::addr::Ipv4Subnet;
use crate::control::dns_forward::Resolver;
use crate::control::host_watch::{self, HostChange};
use crate::engine::gateway::SharedDhcp;
use crate::uplink::sys::routes::host_routes;

/// They, until the runtime ends.
#[derive(Debug)]
pub struct Dependents {
    /// Asks the host's resolvers; none if the guest has no DNS.
    pub resolver: Option<Arc<Resolver>>,
    /// Serves the host's search list.
    pub dhcp: SharedDhcp,
    /// Written once addresses went for good: one for each worker.
    pub workers: Vec<EventFd>,
    /// The guest's, which hides what the host reaches there.
    pub subnet: Ipv4Subnet,
}

impl Dependents {
    /// Lets them follow the host from now on, on the runtime this is called on.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn follow(self) {
        let Dependents { resolver, dhcp, workers, subnet } = self;
        if let Some(resolver) = &resolver {
            let mut search = resolver.search_list();
            tokio::spawn(Arc::clone(resolver).follow());
            tokio::spawn(async move {
                while search.changed().await.is_ok() {
                    let domains = search.borrow_and_update().clone();
                    dhcp.lock().unwrap_or_else(PoisonError::into_inner).set_search(&domains);
                }
            });
        }
        let mut hidden = Hidden { subnet, told: hidden_route(subnet) };
        tokio::spawn(host_watch::follow(move |change| match change {
            HostChange::Way => {
                tracing::info!("the host's network changed");
                hidden.look();
                if let Some(resolver) = &resolver {
                    resolver.network_changed();
                }
            }
            HostChange::AddressesGone => {
                for worker in &workers {
                    // Fails only if the counter is full, and then the worker was woken often enough.
                    let _ = worker.write(1);
                }
            }
        }));
    }
}

/// What the guest's subnet hides of the host's networks, said once for each.
struct Hidden {
    subnet: Ipv4Subnet,
    told: Option<String>,
}

impl Hidden {
    fn look(&mut self) {
        let hidden = hidden_route(self.subnet);
        if hidden != self.told
            && let Some(route) = &hidden
        {
            tracing::warn!(
                subnet = %self.subnet, %route,
                "the guest cannot reach this network of the host: its own subnet lies there; give --subnet"
            );
        }
        self.told = hidden;
    }
}

/// The first of the host's routes that leads where `subnet` is.
fn hidden_route(subnet: Ipv4Subnet) -> Option<String> {
    let routes = host_routes().ok()?;
    routes.iter().find(|route| route.overlaps(subnet)).map(ToString::to_string)
}
