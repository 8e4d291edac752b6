//! Leases by real DHCP clients.

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::{Lab, LabError, Netns};

/// What udhcpc runs on events: configures the interface and notes what it was told.
const UDHCPC_SCRIPT: &str = r#"#!/bin/sh
case "$1" in
bound | renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" broadcast + dev "$interface"
    [ -n "$mtu" ] && ip link set "$interface" mtu "$mtu"
    [ -n "$router" ] && ip route replace default via "$router" dev "$interface"
    env | grep -E '^(ip|mask|router|dns|domain|search|mtu|lease|serverid|hostname|broadcast)=' >"$LEASE_FILE"
    ;;
esac
"#;

/// The same for dhclient, with the names udhcpc uses.
const DHCLIENT_SCRIPT: &str = r#"#!/bin/sh
case "$reason" in
BOUND | RENEW | REBIND)
    ip addr flush dev "$interface"
    ip addr add "$new_ip_address/$new_subnet_mask" broadcast + dev "$interface"
    [ -n "$new_interface_mtu" ] && ip link set "$interface" mtu "$new_interface_mtu"
    ip route replace default via "$new_routers" dev "$interface"
    {
        echo "ip=$new_ip_address"
        echo "router=$new_routers"
        echo "dns=$new_domain_name_servers"
        echo "domain=$new_domain_name"
        echo "search=$new_domain_search"
        echo "mtu=$new_interface_mtu"
        echo "lease=$new_dhcp_lease_time"
        echo "serverid=$new_dhcp_server_identifier"
        echo "hostname=$new_host_name"
        echo "broadcast=$new_broadcast_address"
    } >"$LEASE_FILE"
    ;;
PREINIT) ip link set "$interface" up ;;
esac
"#;

/// What a DHCP client was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The guest's address.
    pub ip: Ipv4Addr,
    /// Its default router.
    pub router: Ipv4Addr,
    /// Everything the client was told, by udhcpc's names: `dns`, `domain`, `mtu`, `lease` (seconds), ...
    pub options: HashMap<String, String>,
}

impl Lease {
    /// The option `name`, empty if it was not sent.
    pub fn option(&self, name: &str) -> &str {
        self.options.get(name).map_or("", String::as_str)
    }
}

impl Lab {
    /// Gets a lease for the guest with udhcpc, within `timeout`; the interface is configured then.
    ///
    /// # Errors
    /// If the client fails or gets none.
    pub fn udhcpc(&self, timeout: Duration) -> Result<Lease, LabError> {
        self.udhcpc_in(&self.guest, &[], timeout)
    }

    /// The same in any namespace, with more arguments to udhcpc.
    ///
    /// # Errors
    /// As [`Self::udhcpc`].
    pub fn udhcpc_in(&self, netns: &Netns, args: &[&str], timeout: Duration) -> Result<Lease, LabError> {
        let script = self.script("udhcpc.sh", UDHCPC_SCRIPT)?;
        let (lease_env, lease) = self.lease_file();
        let script = script.display().to_string();
        let mut words = vec!["env", &lease_env, "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-t", "10"];
        words.extend(["-T", "1", "-O", "mtu", "-O", "search", "-s", &script]);
        words.extend(args);
        netns.run(&words, timeout)?;
        parse(&lease)
    }

    /// Gets a lease for the guest with ISC dhclient, within `timeout`.
    ///
    /// # Errors
    /// If the client fails or gets none.
    pub fn dhclient(&self, timeout: Duration) -> Result<Lease, LabError> {
        let script = self.script("dhclient.sh", DHCLIENT_SCRIPT)?;
        let (lease_env, lease) = self.lease_file();
        let path = |name: &str| self.dir().join(name).display().to_string();
        let (config, leases, pid) = (path("dhclient.conf"), path("dhclient.leases"), path("dhclient.pid"));
        let wishes = "request subnet-mask, broadcast-address, routers, domain-name, domain-search, \
                      domain-name-servers, host-name, interface-mtu;\n";
        for (file, text) in [(&config, wishes), (&leases, "")] {
            fs::write(file, text).map_err(|e| LabError::Io(file.clone(), e))?;
        }
        let script = script.display().to_string();
        let words = [
            "env",
            "-",
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "dhclient",
            "-1",
            "-v",
            "-e",
            &lease_env,
            "-sf",
            &script,
            "-cf",
            &config,
            "-lf",
            &leases,
            "-pf",
            &pid,
            "eth0",
        ];
        self.guest.run(&words, timeout)?;
        // The client stays in the background to renew: the lab's end is its end.
        if let Some(pid) = fs::read_to_string(&pid).ok().and_then(|text| text.trim().parse().ok()) {
            let _ = crate::sys::process::send(pid, crate::sys::process::SIGTERM);
        }
        parse(&lease)
    }

    fn script(&self, name: &str, text: &str) -> Result<PathBuf, LabError> {
        use std::os::unix::fs::PermissionsExt;
        let file = self.dir().join(name);
        fs::write(&file, text)
            .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o755)))
            .map_err(|e| LabError::Io(file.display().to_string(), e))?;
        Ok(file)
    }

    fn lease_file(&self) -> (String, PathBuf) {
        let file = self.dir().join("lease");
        // One of an earlier client may be there or not.
        let _ = fs::remove_file(&file);
        (format!("LEASE_FILE={}", file.display()), file)
    }
}

fn parse(file: &PathBuf) -> Result<Lease, LabError> {
    let bad = |what: &str| {
        let e = std::io::Error::new(std::io::ErrorKind::InvalidData, what.to_owned());
        LabError::Io(file.display().to_string(), e)
    };
    let text = fs::read_to_string(file).map_err(|e| LabError::Io("no lease was noted".into(), e))?;
    let options: HashMap<String, String> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let address = |name: &str| {
        options
            .get(name)
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| bad(&format!("no {name} in lease")))
    };
    Ok(Lease { ip: address("ip")?, router: address("router")?, options })
}
