//! DHCP that cannot answer is silent, is counted with its reason, and says so once a minute.

use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dhcproto::v4::MessageType;
use vunet::addr::MacAddr;
use vunet::engine::counters::DropReason;
use vunet::network::allocator::{Bind, Client, Grant, IpAllocator, Lease, Refusal};
use vunet::network::store::StoreError;
use vunet::time::Instant;

use crate::guest_changes::dhcp;
use crate::rig::{Rig, Setup, secs};

/// Refuses everything for one reason.
#[derive(Debug)]
struct Refusing(fn() -> Refusal);

fn full() -> StoreError {
    StoreError::Full(PathBuf::from("/state/networks/lab/leases.sqlite"))
}

impl IpAllocator for Refusing {
    fn offer(&mut self, _: Instant, _: &Client<'_>, _: Option<Ipv4Addr>) -> Result<Grant, Refusal> {
        Err((self.0)())
    }

    fn bind(&mut self, _: Instant, _: &Client<'_>, _: Ipv4Addr) -> Result<(Bind, Grant), Refusal> {
        Err((self.0)())
    }

    fn withdraw(&mut self, _: Instant, _: MacAddr) -> Result<(), StoreError> {
        Err(full())
    }

    fn release(&mut self, _: Instant, _: MacAddr, _: Ipv4Addr) -> Result<bool, StoreError> {
        Err(full())
    }

    fn decline(&mut self, _: Instant, _: MacAddr, _: Ipv4Addr) -> Result<bool, StoreError> {
        Err(full())
    }

    fn get(&mut self, _: Instant, _: MacAddr) -> Result<Option<Lease>, StoreError> {
        Err(full())
    }

    fn leases(&mut self, _: Instant) -> Result<Vec<Lease>, StoreError> {
        Err(full())
    }
}

/// What is logged, as text.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Log {
    /// The lines at WARN and above while `work` runs.
    fn of(work: impl FnOnce()) -> Vec<String> {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let bytes = log.0.lock().unwrap();
        String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()
    }
}

/// 100 messages in a minute and one after it; returns what was logged.
fn asked_in_vain(
    refusal: fn(&vunet::config::Lan) -> Box<dyn IpAllocator>,
    reason: DropReason,
) -> Vec<String> {
    let mut rig = Rig::with(Setup { leases: refusal, ..Setup::default() });
    Log::of(|| {
        let zero = Ipv4Addr::UNSPECIFIED;
        for n in 0..100 {
            let kind = [MessageType::Discover, MessageType::Request][n % 2];
            let asked = Some(Ipv4Addr::new(10, 0, 2, 2));
            assert!(dhcp(&mut rig, zero, kind, asked).is_none(), "an answer to {kind:?}");
        }
        rig.now = rig.now + secs(61);
        assert!(dhcp(&mut rig, zero, MessageType::Discover, None).is_none());
        assert_eq!(rig.dropped(reason), 101);
        assert_eq!(rig.engine.counters().dropped_total(), 101);
    })
}

#[test]
fn an_exhausted_pool_is_silence_a_count_and_a_line_a_minute() {
    let lines = asked_in_vain(|_| Box::new(Refusing(|| Refusal::Exhausted)), DropReason::PoolExhausted);
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("every address of the subnet is taken"), "{}", lines[0]);
    assert!(lines[0].contains("10.0.2.0/24") && lines[0].contains("more=0"), "{}", lines[0]);
    assert!(lines[1].contains("more=99"), "{}", lines[1]);
}

#[test]
fn a_guest_that_used_its_share_is_told_of_in_the_same_way() {
    let lines = asked_in_vain(|_| Box::new(Refusing(|| Refusal::ShareUsed)), DropReason::PoolExhausted);
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("as many addresses as one may"), "{}", lines[0]);
}

#[test]
fn a_guest_with_anothers_mac_address_is_told_of_in_the_same_way() {
    let lines = asked_in_vain(|_| Box::new(Refusing(|| Refusal::Elsewhere)), DropReason::SpoofedSource);
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("has this MAC address") && lines[0].contains("--mac"), "{}", lines[0]);
}

#[test]
fn a_store_that_cannot_be_written_is_silence_with_the_stores_own_words() {
    let lines = asked_in_vain(|_| Box::new(Refusing(|| Refusal::Store(full()))), DropReason::LeaseStore);
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[0].contains("/state/networks/lab/leases.sqlite: the disk"), "{}", lines[0]);
    let mut rig =
        Rig::with(Setup { leases: |_| Box::new(Refusing(|| Refusal::Exhausted)), ..Setup::default() });
    let lines = Log::of(|| {
        let from = Ipv4Addr::new(10, 0, 2, 2);
        assert!(dhcp(&mut rig, from, MessageType::Release, None).is_none());
        assert!(dhcp(&mut rig, from, MessageType::Decline, Some(from)).is_none());
    });
    assert_eq!((lines.len(), rig.dropped(DropReason::LeaseStore)), (1, 2), "{lines:#?}");
}
