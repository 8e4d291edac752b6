//! The DHCP server against messages as real clients send them, and against what no client sends: with the
//! addresses of one process, and with those of a named network's store. Both answer alike.
//!
//! The messages of udhcpc and dhclient are captures; those of networkd, iPXE and Windows are put
//! together by hand from what these clients are known to send. Replies are compared byte for byte
//! where the bytes matter.

#![expect(clippy::duplicate_mod, reason = "the cases run once with each keeper of addresses")]

#[path = "../support/store.rs"]
mod store;

mod shared;

#[path = "."]
mod in_memory {
    use vunet::config::{DnsConfig, Lan};
    use vunet::service::dhcp::DhcpServer;

    fn server_of(lan: &Lan, dns: &DnsConfig) -> DhcpServer {
        DhcpServer::new(lan, dns)
    }

    #[path = "dhcp.rs"]
    mod cases;
}

#[path = "."]
mod in_store {
    use vunet::config::{DnsConfig, Lan};
    use vunet::service::dhcp::DhcpServer;

    use crate::store;

    fn server_of(lan: &Lan, dns: &DnsConfig) -> DhcpServer {
        let folder = store::folder();
        // The folder may go: the files are open.
        let leases = store::open(folder.path(), store::alone(lan.subnet, lan.gateway, lan.guest));
        DhcpServer::over(Box::new(leases), lan, dns)
    }

    #[path = "dhcp.rs"]
    mod cases;
}
