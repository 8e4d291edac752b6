//! A host between vunet's link and the world.
//!
//! ```text
//!  guest ~~ vunet -- e1 (TAP) 10.0.2.1 or 198.18.0.1 -- host routes -- p0 192.0.2.1 --- e0 192.0.2.2 world
//!  guest ~~ vunet -- TAP -- br0 -- p0 --- e0 192.0.2.2, and 10.0.2.1 or 198.18.0.1, world
//! ```
//! Routed, all is the same whoever translates: nobody, vunet on its way to the TAP, or the host's kernel on the way
//! out. Only there are rules loaded, so that only there the kernel tracks connections. Bridged, the world is the router.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::site::{BenchError, OUTSIDE, OUTSIDE_ROUTER, Seen, WORLD_END, Way, during};
use crate::lab::{self, HOST, Lab, SHORT};

/// The frame guest's frames go to this MAC address unless it is told another, vunet's gateway's.
const GATEWAY_MAC: &str = "02:ab:cd:00:00:01";
/// What the host's kernel is told to do.
const MASQUERADE: &str =
    "table ip bench { chain out { type nat hook postrouting priority srcnat; oifname \"p0\" masquerade; }; }";
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(20);

/// Looks until `holds` does.
fn wait(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), BenchError> {
    let deadline = Instant::now() + SHORT;
    while !holds() {
        if Instant::now() > deadline {
            return Err(BenchError::Result(format!("waited {} s in vain for {what}", SHORT.as_secs())));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// The next hop of vunet's link.
fn router(seen: Seen) -> std::net::Ipv4Addr {
    if seen == Seen::Vunets { OUTSIDE_ROUTER } else { lab::GATEWAY }
}

/// What vunet needs to be there when it starts.
pub(super) fn prepare(lab: &Lab, way: Way, seen: Seen) -> Result<(), BenchError> {
    if way == Way::Bridged {
        lab.make_bridge(HOST)?;
        // Where the kernel can do it at all, bridges hand frames to the rules of routing, which is most of their cost here.
        let _ = lab.host.sysctl("net.bridge.bridge-nf-call-iptables", "0");
        lab.ip(&lab.world, &format!("link set e0 address {GATEWAY_MAC}"))?;
        lab.ip(&lab.world, &format!("addr add {}/24 dev e0", router(seen)))?;
    }
    Ok(())
}

/// Has packets pass between the link of a vunet just started and the world.
pub(super) fn make_way(lab: &Lab, way: Way, seen: Seen) -> Result<(), BenchError> {
    match way {
        Way::Bridged => wait("the TAP", || lab.bridge_ports().is_ok_and(|ports| ports.len() > 1))?,
        Way::Routed => route(lab, seen)?,
    }
    if seen == Seen::Vunets { await_station(lab, way) } else { Ok(()) }
}

fn route(lab: &Lab, seen: Seen) -> Result<(), BenchError> {
    let look = ["ip", "link", "show", WORLD_END];
    wait("the TAP", || lab.host.run(&look, SHORT).is_ok())?;
    lab.host.sysctl("net.ipv4.ip_forward", "1")?;
    lab.ip(&lab.host, &format!("link set {WORLD_END} address {GATEWAY_MAC}"))?;
    lab.ip(&lab.host, &format!("addr add {}/24 dev {WORLD_END}", router(seen)))?;
    lab.ip(&lab.host, &format!("link set {WORLD_END} up"))?;
    match seen {
        Seen::Hosts => {
            let file = lab.dir().join("masquerade.nft");
            fs::write(&file, MASQUERADE).map_err(during("the host's rules"))?;
            lab.host.run(&["nft", "-f", &file.display().to_string()], SHORT)?;
        }
        Seen::Own => lab.ip(&lab.world, &format!("route add 10.0.2.0/24 via {HOST}"))?,
        Seen::Vunets => lab.ip(&lab.world, &format!("route add 198.18.0.0/24 via {HOST}"))?,
    }
    Ok(())
}

/// Waits until vunet holds its address: then it answers ARP.
fn await_station(lab: &Lab, way: Way) -> Result<(), BenchError> {
    let netns = if way == Way::Routed { &lab.host } else { &lab.world };
    let to = OUTSIDE.to_string();
    wait("vunet's address on its link", || {
        // Nothing answers but ARP.
        let sent = netns.inside(|| std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"?", (OUTSIDE, 9)));
        let known = netns.run(&["ip", "neigh", "show", "to", &to], SHORT);
        sent.is_ok() && known.is_ok_and(|known| known.stdout.contains("lladdr"))
    })
}
