//! What the LAN's DHCP server leased to the guest is kept for the next process of the same guest.
//!
//! On a link the guard lets the guest send from addresses that the LAN's own server leased it, which it sees as
//! they go by. A guest renews when half of its lease is over; should vunet end before, the next one reads here
//! what its guest has. The workers tell of changes ([`SharedTable::news`]) and wait for nobody; this writes
//! them down, one small file for each MAC address of a link, put in its place by a rename: a kill leaves the
//! old one or the new one.
//!
//! A file counts within the boot it was written in, for the guest is gone with the host, and by the clock of
//! that boot. What it says is checked as if anybody had written it, though its folder is this user's alone.
//!
//! May touch: `engine::lan::guard`, `network::clock`, files. Read first: rename(2).
//!
//! [`SharedTable::news`]: crate::engine::lan::guard::SharedTable::news

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::addr::MacAddr;
use crate::engine::lan::guard::{LeaseNews, StationLease};
use crate::limits::{GUARD_IPV4_MAX, STATION_FILE_BYTES_MAX, STATION_FILES_MAX};
use crate::network::clock::HostClock;

const SUFFIX: &str = ".json";

/// A file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// The boot it counts in.
    boot: String,
    leases: Vec<KeptLease>,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeptLease {
    addr: Ipv4Addr,
    /// In microseconds of that boot; without end if there is none.
    until_us: Option<i64>,
}

/// The leases of the stations of one link.
#[derive(Debug)]
pub struct StationLeases {
    folder: PathBuf,
    /// The link's name, which files begin with.
    link: String,
    clock: Arc<dyn HostClock>,
}

impl StationLeases {
    /// Those of `link` (no `/` in it) in `folder`, which is made if need be.
    ///
    /// # Errors
    /// The file system's refusal; `PermissionDenied` if others can write there.
    pub fn open(folder: &Path, link: &str, clock: Arc<dyn HostClock>) -> io::Result<StationLeases> {
        DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let found = fs::metadata(folder)?;
        if found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
            let why = "others can write there, and so let guests have addresses";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let keeper = StationLeases { folder: folder.to_owned(), link: link.to_owned(), clock };
        // Said now and not when the guest has its lease.
        let probe = keeper.folder.join(format!(".{}.probe", std::process::id()));
        File::create(&probe)?;
        fs::remove_file(&probe)?;
        Ok(keeper)
    }

    fn name(&self, mac: MacAddr) -> String {
        format!("{}@{}{SUFFIX}", self.link, mac.to_string().replace(':', "-"))
    }

    /// The station a file of this link is about.
    fn station(&self, name: &str) -> Option<MacAddr> {
        let mac = name.strip_prefix(&*self.link)?.strip_prefix('@')?.strip_suffix(SUFFIX)?;
        let mac: MacAddr = mac.replace('-', ":").parse().ok()?;
        mac.is_unicast().then_some(mac)
    }

    /// What is known of all stations of the link: leases that run. Files without any are removed.
    ///
    /// # Errors
    /// The folder's; a file that cannot be read or makes no sense counts as none.
    pub fn load(&self) -> io::Result<Vec<StationLease>> {
        let mut leases = Vec::new();
        for entry in fs::read_dir(&self.folder)?.take(2 * STATION_FILES_MAX) {
            let entry = entry?;
            let Some(mac) = entry.file_name().to_str().and_then(|name| self.station(name)) else { continue };
            let before = leases.len();
            leases.extend(self.read(&entry.path(), mac));
            if leases.len() == before {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(leases)
    }

    /// The leases in the file at `path` that run.
    fn read(&self, path: &Path, mac: MacAddr) -> Vec<StationLease> {
        let mut bytes = Vec::new();
        let file =
            File::open(path).and_then(|file| file.take(STATION_FILE_BYTES_MAX).read_to_end(&mut bytes));
        let kept = file.ok().and_then(|_| serde_json::from_slice::<Kept>(&bytes).ok());
        let Some(kept) = kept.filter(|kept| kept.boot == self.clock.boot_id()) else { return Vec::new() };
        let now_us = self.clock.now().boottime_us;
        let lease = |kept: &KeptLease| {
            let left = match kept.until_us {
                None => None,
                // No server can say more (RFC 2132, 9.2).
                Some(until) => Some(u32::try_from(until.saturating_sub(now_us).div_euclid(1_000_000)).ok()?),
            };
            let left = left.map(|seconds| Duration::from_secs(seconds.into()));
            let runs = left.is_none_or(|left| !left.is_zero());
            (runs && is_stations(kept.addr)).then_some(StationLease { mac, addr: kept.addr, left })
        };
        kept.leases.iter().take(GUARD_IPV4_MAX).filter_map(lease).collect()
    }

    /// Writes down what a station has now.
    ///
    /// # Errors
    /// The file system's refusal; `QuotaExceeded` past [`STATION_FILES_MAX`] stations.
    pub fn store(&self, news: &LeaseNews) -> io::Result<()> {
        let name = self.name(news.mac);
        let path = self.folder.join(&name);
        let now_us = self.clock.now().boottime_us;
        let until =
            |left: Duration| now_us.saturating_add(i64::try_from(left.as_micros()).unwrap_or(i64::MAX));
        let running = news.leases.iter().filter(|lease| lease.left.is_none_or(|left| !left.is_zero()));
        let leases: Vec<KeptLease> =
            running.map(|lease| KeptLease { addr: lease.addr, until_us: lease.left.map(until) }).collect();
        if leases.is_empty() {
            return match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        if !path.exists() && fs::read_dir(&self.folder)?.count() >= STATION_FILES_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        let kept = Kept { boot: self.clock.boot_id().to_owned(), leases };
        let new = self.folder.join(format!(".{name}.new"));
        fs::write(&new, serde_json::to_vec(&kept).map_err(io::Error::other)?)?;
        fs::rename(new, path)
    }
}

/// Whether a station can have the address.
fn is_stations(addr: Ipv4Addr) -> bool {
    let nobodys = addr.is_unspecified() || addr.is_loopback() || addr.is_multicast();
    !nobodys && addr.octets()[0] < 240
}

/// Writes down the news of leases for as long as it is polled; says once if it cannot.
pub async fn keep(keeper: StationLeases, mut news: watch::Receiver<Option<LeaseNews>>) {
    let keeper = Arc::new(keeper);
    let mut told = false;
    while news.changed().await.is_ok() {
        let Some(latest) = news.borrow_and_update().clone() else { continue };
        let writer = Arc::clone(&keeper);
        let outcome = tokio::task::spawn_blocking(move || writer.store(&latest)).await;
        if let Ok(Err(error)) = outcome
            && !std::mem::replace(&mut told, true)
        {
            let folder = keeper.folder.display();
            tracing::warn!(%error, %folder, "the guest's lease cannot be kept: after the next start of vunet \
                it is cut off until it renews");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;
    use crate::network::clock::Moment;

    const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);
    const OTHER: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 2]);
    const IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 100);

    #[derive(Debug)]
    struct At(&'static str, AtomicI64);

    impl HostClock for At {
        fn boot_id(&self) -> &str {
            self.0
        }
        fn now(&self) -> Moment {
            let boottime_us = self.1.load(Ordering::Relaxed);
            Moment { boottime_us, wall_us: boottime_us }
        }
    }

    fn open(folder: &Path, link: &str, boot: &'static str, seconds: i64) -> StationLeases {
        let clock = At(boot, AtomicI64::new(seconds * 1_000_000));
        StationLeases::open(folder, link, Arc::new(clock)).unwrap()
    }

    fn lease(mac: MacAddr, addr: Ipv4Addr, left_s: Option<u64>) -> StationLease {
        StationLease { mac, addr, left: left_s.map(Duration::from_secs) }
    }

    fn news(mac: MacAddr, left_s: Option<u64>) -> LeaseNews {
        LeaseNews { mac, leases: vec![lease(mac, IP, left_s)] }
    }

    fn files(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn a_lease_is_known_to_the_next_process_for_what_is_left_of_it() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("stations");
        let keeper = open(&folder, "bridge-br0", "boot", 100);
        keeper.store(&news(MAC, Some(3600))).unwrap();
        keeper.store(&news(OTHER, None)).unwrap();
        open(&folder, "bridge-br1", "boot", 100).store(&news(MAC, Some(9))).unwrap();
        let mut found = open(&folder, "bridge-br0", "boot", 700).load().unwrap();
        found.sort_by_key(|lease| lease.mac);
        assert_eq!(found, [lease(MAC, IP, Some(3000)), lease(OTHER, IP, None)]);
        assert_eq!(files(&folder), 3, "another link's is not looked at");
        // Its end, and the guest's NAK.
        let late = open(&folder, "bridge-br0", "boot", 3700);
        assert_eq!(late.load().unwrap(), [lease(OTHER, IP, None)]);
        late.store(&LeaseNews { mac: OTHER, leases: Vec::new() }).unwrap();
        late.store(&LeaseNews { mac: OTHER, leases: Vec::new() }).unwrap();
        assert_eq!((late.load().unwrap(), files(&folder)), (Vec::new(), 1));
    }

    #[test]
    fn nothing_of_another_boot_counts() {
        let place = tempfile::tempdir().unwrap();
        open(place.path(), "tap", "one", 100).store(&news(MAC, None)).unwrap();
        assert_eq!(open(place.path(), "tap", "two", 0).load().unwrap(), []);
        assert_eq!(files(place.path()), 0);
    }

    #[test]
    fn a_file_that_says_what_no_server_can_is_none() {
        let place = tempfile::tempdir().unwrap();
        let keeper = open(place.path(), "tap", "boot", 0);
        let path = place.path().join(keeper.name(MAC));
        let says = |text: &str| {
            fs::write(&path, text).unwrap();
            keeper.load().unwrap()
        };
        let of = |leases: &str| format!("{{\"boot\":\"boot\",\"leases\":[{leases}]}}");
        let good = "{\"addr\":\"192.0.2.100\",\"until_us\":60000000}";
        assert_eq!(says(&of(good)), [lease(MAC, IP, Some(60))]);
        assert_eq!(
            says(&of(&vec![good; 100].join(","))).len(),
            GUARD_IPV4_MAX,
            "no more than a guest may have"
        );
        for bad in ["", "{", "[]", &of(good)[..40], &(" ".repeat(1 << 20) + &of(good))] {
            assert_eq!(says(bad), [], "{:?}", &bad[..bad.len().min(50)]);
        }
        for addr in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "x", "::1"] {
            assert_eq!(says(&of(&format!("{{\"addr\":\"{addr}\",\"until_us\":null}}"))), [], "{addr}");
        }
        for until in ["0", "-1", "9223372036854775807", "1e99", "\"1\""] {
            let text = of(&format!("{{\"addr\":\"192.0.2.100\",\"until_us\":{until}}}"));
            assert_eq!(says(&text), [], "{until}");
        }
        for name in ["tap@52-54-00-00-00.json", "tap@ff-ff-ff-ff-ff-ff.json", "tap@x.json", "tap.json"] {
            fs::write(place.path().join(name), of(good)).unwrap();
            assert_eq!(keeper.load().unwrap(), [], "{name}");
            assert!(place.path().join(name).exists(), "{name}: not ours to remove");
        }
    }

    #[test]
    fn one_station_past_the_bound_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let keeper = open(place.path(), "tap", "boot", 0);
        keeper.store(&news(MAC, Some(60))).unwrap();
        for n in 1..STATION_FILES_MAX {
            fs::write(place.path().join(format!("{n}")), "").unwrap();
        }
        assert_eq!(keeper.store(&news(OTHER, Some(60))).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
        keeper.store(&news(MAC, Some(70))).unwrap();
        assert_eq!(keeper.load().unwrap(), [lease(MAC, IP, Some(70))]);
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o770)).unwrap();
        let clock = Arc::new(At("boot", AtomicI64::new(0)));
        let error = StationLeases::open(place.path(), "tap", clock).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
