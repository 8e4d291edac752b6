//! A host that routes between the guest's TAP and the world.
//!
//! ```text
//!  guest ~~ vunet -- e1 (TAP) 10.0.2.1 or 198.18.0.1 -- host routes -- p0 192.0.2.1 --- e0 192.0.2.2 world
//! ```
//! TAP, routes and link are the same whoever translates: nobody, vunet on its way to the TAP, or the host's kernel on the way
//! out. Only there are rules loaded, so that only there the kernel tracks connections.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use super::site::{BenchError, OUTSIDE, OUTSIDE_ROUTER, Seen, WORLD_END, during};
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

/// Has the host route between the TAP that a vunet just started makes and the world.
pub(super) fn make_way(lab: &Lab, seen: Seen) -> Result<(), BenchError> {
    let look = ["ip", "link", "show", WORLD_END];
    wait("the TAP", || lab.host.run(&look, SHORT).is_ok())?;
    let (router, beyond) = match seen {
        Seen::Vunets => (OUTSIDE_ROUTER, "198.18.0.0/24"),
        Seen::Own | Seen::Hosts => (lab::GATEWAY, "10.0.2.0/24"),
    };
    lab.host.sysctl("net.ipv4.ip_forward", "1")?;
    lab.ip(&lab.host, &format!("link set {WORLD_END} address {GATEWAY_MAC}"))?;
    lab.ip(&lab.host, &format!("addr add {router}/24 dev {WORLD_END}"))?;
    lab.ip(&lab.host, &format!("link set {WORLD_END} up"))?;
    match seen {
        Seen::Hosts => {
            let file = lab.dir().join("masquerade.nft");
            fs::write(&file, MASQUERADE).map_err(during("the host's rules"))?;
            lab.host.run(&["nft", "-f", &file.display().to_string()], SHORT)?;
        }
        Seen::Own | Seen::Vunets => lab.ip(&lab.world, &format!("route add {beyond} via {HOST}"))?,
    }
    if seen == Seen::Vunets { await_station(lab) } else { Ok(()) }
}

/// Waits until vunet holds its address: then it answers ARP.
fn await_station(lab: &Lab) -> Result<(), BenchError> {
    let to = OUTSIDE.to_string();
    wait("vunet's address on the TAP", || {
        // Nothing answers but ARP.
        let sent = lab.host.inside(|| std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"?", (OUTSIDE, 9)));
        let known = lab.host.run(&["ip", "neigh", "show", "to", &to], SHORT);
        sent.is_ok() && known.is_ok_and(|known| known.stdout.contains("lladdr"))
    })
}
