//! Files that are not ours, damaged, of a later version, of another network; disks that are full or take no
//! writing. Each is an error that says so.
//!
//! What needs a file system of its own runs in a mount namespace: this test program starts itself there.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rusqlite::Connection;
use vunet::network::allocator::{IpAllocator, Refusal};
use vunet::network::store::{FILE_NAME, LeaseStore, StoreError};

use crate::store::{self, TestClock};
use crate::{at, client, ip, lease, pool};

fn open(folder: &Path) -> Result<LeaseStore, StoreError> {
    LeaseStore::open(folder, pool(), TestClock::new("boot", 0), 1)
}

fn error_of(folder: &Path) -> String {
    open(folder).unwrap_err().to_string()
}

#[test]
fn what_is_no_store_of_ours_is_left_as_it_is() {
    let folder = store::folder();
    let file = folder.path().join(FILE_NAME);
    fs::write(&file, "leases of some other program\n".repeat(100)).unwrap();
    assert!(error_of(folder.path()).contains("not a lease store of vunet"));
    assert!(fs::read_to_string(&file).unwrap().starts_with("leases of some other program\n"));
    fs::remove_file(&file).unwrap();
    Connection::open(&file).unwrap().execute_batch("CREATE TABLE theirs(x)").unwrap();
    assert!(error_of(folder.path()).contains("not a lease store of vunet"));
    let theirs = Connection::open(&file).unwrap();
    assert_eq!(theirs.query_row("SELECT count(*) FROM theirs", [], |row| row.get::<_, i64>(0)), Ok(0));
}

#[test]
fn a_store_of_a_later_version_is_not_touched() {
    let folder = store::folder();
    lease(&mut open(folder.path()).unwrap(), at(0), &client(1));
    let file = Connection::open(folder.path().join(FILE_NAME)).unwrap();
    file.pragma_update(None, "user_version", 3).unwrap();
    let error = error_of(folder.path());
    assert!(error.contains("layout 3, this version knows 2"), "{error}");
    assert_eq!(file.query_row("SELECT count(*) FROM lease", [], |row| row.get::<_, i64>(0)), Ok(1));
}

#[test]
fn a_damaged_store_is_told_of_when_it_is_opened() {
    let folder = store::folder();
    let mut whole = open(folder.path()).unwrap();
    for n in 0..16 {
        lease(&mut whole, at(0), &client(n));
    }
    drop(whole);
    let path = folder.path().join(FILE_NAME);
    let len_bytes = fs::metadata(&path).unwrap().len();
    let file = fs::File::options().write(true).open(&path).unwrap();
    for page in 1..len_bytes / 4096 {
        file.write_all_at(&[0x5a; 512], page * 4096).unwrap();
    }
    let error = error_of(folder.path());
    assert!(error.contains("damaged"), "{error}");
    // Cut short, as by a failing disk.
    file.set_len(len_bytes / 2 / 4096 * 4096 + 100).unwrap();
    let error = error_of(folder.path());
    assert!(error.contains("damaged"), "{error}");
}

#[test]
fn the_store_of_another_subnet_is_refused() {
    let folder = store::folder();
    drop(open(folder.path()).unwrap());
    let mut other = pool();
    other.gateway = ip(254);
    let error = LeaseStore::open(folder.path(), other, TestClock::new("boot", 0), 1).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("10.0.2.0/24 with gateway 10.0.2.1, but"), "{error}");
    assert!(error.contains("says 10.0.2.0/24 with gateway 10.0.2.254"), "{error}");
}

#[test]
fn a_folder_that_is_not_there_is_told_of_as_that() {
    let folder = store::folder();
    let error = open(&folder.path().join("none")).unwrap_err();
    assert!(matches!(error, StoreError::Other { .. }), "{error:?}");
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("No such file or directory"), "{source}");
}

/// Runs `setup` (a shell script, with the folder as `$1`) and then the ignored test `name` of this program in
/// a user and mount namespace of their own.
#[track_caller]
fn in_namespace(folder: &Path, setup: &str, name: &str) {
    let me = std::env::current_exe().unwrap();
    let script = format!("set -e\n{setup}\nexec \"$2\" --exact \"$3\" --ignored --nocapture");
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .args([folder.as_os_str(), me.as_os_str(), name.as_ref()])
        .env("VUNET_TEST_FOLDER", folder)
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// The folder for a test that [`in_namespace`] started; none if somebody runs all ignored tests.
fn given_folder() -> Option<PathBuf> {
    Some(std::env::var_os("VUNET_TEST_FOLDER")?.into())
}

#[test]
fn a_disk_that_takes_no_writing_is_told_of() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    drop(open(folder.path()).unwrap());
    let read_only = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\"";
    in_namespace(folder.path(), read_only, "files::read_only");
}

#[test]
#[ignore = "started by a_disk_that_takes_no_writing_is_told_of in a namespace"]
fn read_only() {
    let Some(folder) = given_folder() else { return };
    let error = open(&folder).unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly(_)), "{error:?}");
    assert!(error.to_string().contains("--state-dir"));
}

#[test]
fn a_full_disk_is_told_of_and_leases_go_on_once_there_is_room() {
    let folder = store::folder();
    in_namespace(folder.path(), "mount -t tmpfs -o size=1m none \"$1\"", "files::full");
}

#[test]
#[ignore = "started by a_full_disk_is_told_of_and_leases_go_on_once_there_is_room in a namespace"]
fn full() {
    let Some(folder) = given_folder() else { return };
    let mut store = open(&folder).unwrap();
    assert_eq!(lease(&mut store, at(0), &client(1)).ip, ip(2));
    let filler = folder.join("filler");
    assert!(fs::write(&filler, vec![1; 1 << 20]).is_err(), "the disk has room for more than it has");
    let refused = (2..200).find_map(|n| store.offer(at(0), &client(n), None).err());
    let Some(Refusal::Store(error @ StoreError::Full(_))) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("free some room"));
    let known = store.leases(at(0)).unwrap().len();
    assert!(known >= 1);
    fs::remove_file(filler).unwrap();
    assert_eq!(store.leases(at(0)).unwrap().len(), known, "what failed left nothing");
    lease(&mut store, at(1), &client(1));
    lease(&mut store, at(31), &client(500));
    assert!(open(&folder).is_ok());
}
