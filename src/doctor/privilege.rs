//! What this process may: capabilities, the TUN device, namespaces of its own.
//!
//! Read first: capabilities(7), user_namespaces(7).

use std::fs::OpenOptions;
use std::io;

use super::check::{Check, Fix};
use super::tree::Tree;
use crate::sandbox::namespaces::Obstacle;
use crate::uplink::sys::tap::CLONE_DEVICE;

/// Bits of capabilities (`linux/capability.h`).
pub(super) const CAP_DAC_OVERRIDE: u32 = 1;
pub(super) const CAP_NET_ADMIN: u32 = 12;
pub(super) const CAP_SYS_RESOURCE: u32 = 24;
pub(super) const CAP_MKNOD: u32 = 27;

/// Who asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Who {
    /// The effective user.
    pub(super) uid: u32,
    /// The effective group.
    pub(super) gid: u32,
    /// Capabilities in effect.
    effective: u64,
    /// Those that can be had at all.
    bounding: u64,
}

impl Who {
    pub(super) fn read(tree: &Tree) -> Who {
        Who::parse(&tree.text("/proc/self/status").unwrap_or_default())
    }

    /// The form is that of `/proc/PID/status` (proc(5)).
    pub(super) fn parse(status: &str) -> Who {
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or_default()
        };
        // Real, effective, saved, of the file system.
        let id =
            |name| field(name).split_whitespace().nth(1).and_then(|id| id.parse().ok()).unwrap_or(u32::MAX);
        let set = |name| u64::from_str_radix(field(name).trim(), 16).unwrap_or_default();
        Who { uid: id("Uid"), gid: id("Gid"), effective: set("CapEff"), bounding: set("CapBnd") }
    }

    pub(super) fn is_root(self) -> bool {
        self.uid == 0
    }

    pub(super) fn has(self, capability: u32) -> bool {
        self.effective & 1 << capability != 0
    }

    /// Whether it could be given to a process that is started here.
    pub(super) fn could_have(self, capability: u32) -> bool {
        self.bounding & 1 << capability != 0
    }
}

/// What to do about a lack of CAP_NET_ADMIN for the run of the command `line`.
pub(super) fn get_net_admin(who: Who, line: &str) -> Fix {
    if who.has(CAP_NET_ADMIN) {
        return Fix::advice(
            "start vunet outside of the user namespace it is in, or within a network namespace of its own (unshare --net)",
        );
    }
    if !who.could_have(CAP_NET_ADMIN) {
        return Fix::advice(
            "give it to the container (docker run --cap-add NET_ADMIN) or the service (CapabilityBoundingSet=CAP_NET_ADMIN, \
             AmbientCapabilities=CAP_NET_ADMIN)",
        );
    }
    let (uid, gid) = (who.uid, who.gid);
    Fix::root(format!(
        "setpriv --reuid={uid} --regid={gid} --init-groups --inh-caps=+net_admin --ambient-caps=+net_admin {line}"
    ))
}

/// The device that every TAP is opened through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tun {
    /// Why it cannot be opened, as an error number.
    pub(super) refused: Option<i32>,
    /// Whether the kernel has the driver already.
    pub(super) has_driver: bool,
}

impl Tun {
    /// Opens it, which makes nothing, and closes it.
    pub(super) fn read(tree: &Tree) -> Tun {
        let opened = OpenOptions::new().read(true).write(true).open(tree.path(CLONE_DEVICE));
        let refused = opened.err().map(|error| error.raw_os_error().unwrap_or(libc::EIO));
        // A line is a minor number and a name.
        let is_tun = |line: &str| line.split_whitespace().eq(["200", "tun"]);
        let has_driver = tree.text("/proc/misc").is_some_and(|devices| devices.lines().any(is_tun));
        Tun { refused, has_driver }
    }
}

/// `/dev/net/tun`.
pub(super) fn tun(tun: &Tun) -> Check {
    const NAME: &str = CLONE_DEVICE;
    let Some(refused) = tun.refused else { return Check::ok(NAME, "can be opened") };
    let why = io::Error::from_raw_os_error(refused);
    let says = format!("cannot be opened, so no TAP can be had: {why}");
    let fix = match refused {
        libc::ENOENT | libc::ENOTDIR if tun.has_driver => Fix::AsRoot(vec![
            "mkdir -p /dev/net".to_owned(),
            "mknod -m 0666 /dev/net/tun c 10 200".to_owned(),
        ]),
        libc::ENOENT | libc::ENOTDIR | libc::ENODEV | libc::ENXIO => Fix::root("modprobe tun"),
        libc::EACCES => Fix::root("chmod 0666 /dev/net/tun"),
        _ => Fix::advice("give the container the device (docker run --device /dev/net/tun)"),
    };
    Check::missing(NAME, says, fix)
}

/// Namespaces of users and networks, with a bridge and a TAP in them; `outcome` is what trying it came to.
pub(super) fn namespaces(outcome: Option<&Result<(), String>>) -> Check {
    const NAME: &str = "user namespaces";
    let said = match outcome {
        Some(Ok(())) => {
            return Check::ok(NAME, "a bridge and a TAP can be made in namespaces of this user's");
        }
        Some(Err(said)) => said,
        None => {
            return Check::late(NAME, super::check::State::Missing, "look at the host's log for what hangs");
        }
    };
    if said.contains(CLONE_DEVICE) {
        return Check::ok(NAME, format!("this user may make them; {said}"));
    }
    let fix = match Obstacle::told_in(said).map(Obstacle::settings) {
        Some([]) => Fix::advice(
            "run vunet outside of it, or let it pass (docker run --security-opt seccomp=unconfined), or without \
             --rootless",
        ),
        Some(settings) => Fix::sysctl(settings),
        None if said.contains("bridge") => Fix::root("modprobe bridge"),
        None => Fix::advice("do what that names (containers: mount /proc), or run without --rootless"),
    };
    Check::missing(NAME, said.clone(), fix)
}

#[cfg(test)]
mod tests {
    use super::super::check::State;
    use super::super::tree::planted;
    use super::*;
    use crate::sandbox::namespaces::NamespaceError;

    const USER: &str = "Name:\tvunet\nUid:\t1000\t1001\t1000\t1000\nGid:\t100\t101\t100\t100\n\
                        CapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\n";

    #[test]
    fn who_asks_is_read_as_the_kernel_says_it() {
        let who = Who::parse(USER);
        assert_eq!((who.uid, who.gid, who.is_root()), (1001, 101, false));
        assert!(!who.has(CAP_NET_ADMIN) && who.could_have(CAP_NET_ADMIN));
        let admin = Who::parse("Uid:\t0\t0\t0\t0\nCapEff:\t0000000000001000\nCapBnd:\t0000000000001000\n");
        assert!(admin.is_root() && admin.has(CAP_NET_ADMIN) && !admin.has(CAP_MKNOD));
        assert!(!Who::parse("").is_root(), "who is not known is not taken for root");
    }

    #[test]
    fn net_admin_is_had_in_a_way_that_is_open_to_who_asks() {
        let fix = get_net_admin(Who::parse(USER), "vunet ...");
        assert_eq!(
            fix.line(false),
            "sudo setpriv --reuid=1001 --regid=101 --init-groups --inh-caps=+net_admin --ambient-caps=+net_admin vunet ..."
        );
        let contained = Who::parse("Uid:\t0\t0\t0\t0\nCapEff:\t0\nCapBnd:\t0\n");
        assert!(get_net_admin(contained, "vunet ...").line(true).contains("--cap-add NET_ADMIN"));
        let elsewhere = Who::parse("Uid:\t0\t0\t0\t0\nCapEff:\t1000\nCapBnd:\t1000\n");
        assert!(get_net_admin(elsewhere, "vunet ...").line(true).contains("outside of the user namespace"));
    }

    #[test]
    fn the_device_is_made_loaded_or_given_by_what_lacks() {
        let fix = |refused, has_driver| {
            let check = tun(&Tun { refused: Some(refused), has_driver });
            assert_eq!(check.state, State::Missing);
            check.fix.unwrap().line(true)
        };
        assert_eq!(fix(libc::ENOENT, true), "mkdir -p /dev/net && mknod -m 0666 /dev/net/tun c 10 200");
        assert_eq!(fix(libc::ENOENT, false), "modprobe tun");
        assert_eq!(fix(libc::ENODEV, false), "modprobe tun");
        assert_eq!(fix(libc::EACCES, true), "chmod 0666 /dev/net/tun");
        assert!(fix(libc::EPERM, true).contains("--device /dev/net/tun"));
        assert_eq!(tun(&Tun { refused: None, has_driver: true }).state, State::Ok);
    }

    #[test]
    fn a_missing_device_and_a_driver_are_found_in_files() {
        let (_folder, tree) = planted(&[("/proc/misc", " 59 cpu_dma\n200 tun\n237 loop-control\n")]);
        assert_eq!(Tun::read(&tree), Tun { refused: Some(libc::ENOENT), has_driver: true });
        let (_folder, tree) = planted(&[("/proc/misc", "200 tunnel\n"), (CLONE_DEVICE, "")]);
        assert_eq!(Tun::read(&tree), Tun { refused: None, has_driver: false });
    }

    #[test]
    fn the_setting_that_forbids_namespaces_is_set() {
        let of = |obstacle: Obstacle| {
            let source = io::Error::from_raw_os_error(libc::EPERM);
            let error = NamespaceError::Forbidden { hint: obstacle.hint().to_owned(), source };
            let check = namespaces(Some(&Err(error.to_string())));
            assert_eq!(check.state, State::Missing);
            check.fix.unwrap()
        };
        assert_eq!(of(Obstacle::Zero).line(true), "sysctl -w user.max_user_namespaces=1000");
        assert_eq!(of(Obstacle::Switch).line(false), "sudo sysctl -w kernel.unprivileged_userns_clone=1");
        let apparmor = of(Obstacle::AppArmor).line(true);
        assert_eq!(apparmor, "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0");
        assert!(of(Obstacle::Bound).line(true).contains("user.max_net_namespaces=15000"));
        assert!(!of(Obstacle::Policy).is_command());
        assert_eq!(namespaces(Some(&Ok(()))).state, State::Ok);
        assert_eq!(namespaces(None).state, State::Missing);
        let no_tun = namespaces(Some(&Err(format!("cannot open {CLONE_DEVICE}: no such file"))));
        assert_eq!(no_tun.state, State::Ok, "the device is told of by itself");
        let no_bridge = namespaces(Some(&Err("cannot make bridge vn-lan: not supported".to_owned())));
        assert_eq!(no_bridge.fix.unwrap().line(true), "modprobe bridge");
        let no_child = namespaces(Some(&Err("cannot start a child process: no such file".to_owned())));
        assert!(!no_child.fix.unwrap().is_command(), "a module has nothing to do with it");
    }
}
