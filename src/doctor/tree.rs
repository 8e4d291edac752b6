//! Files of the kernel and of `/etc`, read below a root that tests can choose.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

/// Bytes of a file that are read: the longest here is `/proc/net/unix`, of a host with ten thousand sockets.
const BYTES_MAX: u64 = 2 << 20;

/// Where files are read.
#[derive(Clone, Debug)]
pub(super) struct Tree(PathBuf);

impl Tree {
    /// This host's own.
    pub(super) fn of_host() -> Tree {
        Tree(PathBuf::from("/"))
    }

    /// One below `root`.
    #[cfg(test)]
    pub(super) fn below(root: &std::path::Path) -> Tree {
        Tree(root.to_owned())
    }

    /// The file `path`, an absolute one.
    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.0.join(path.trim_start_matches('/'))
    }

    /// The text of the file `path`; none if it cannot be read.
    pub(super) fn text(&self, path: &str) -> Option<String> {
        let mut bytes = Vec::new();
        File::open(self.path(path)).ok()?.take(BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A kernel setting, such as `net.ipv4.ip_forward`, without the space around it; none if there is no such.
    pub(super) fn sysctl(&self, name: &str) -> Option<String> {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        self.text(&path).map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// The same as a number.
    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.sysctl(name)?.parse().ok()
    }
}

/// A tree of files for tests.
#[cfg(test)]
pub(super) fn planted(files: &[(&str, &str)]) -> (tempfile::TempDir, Tree) {
    let folder = tempfile::tempdir().expect("a folder");
    for (path, text) in files {
        let file = folder.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(file.parent().expect("a file is in a folder")).expect("a folder");
        std::fs::write(file, text).expect("a file");
    }
    let tree = Tree::below(folder.path());
    (folder, tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_files_and_what_is_not_there_is_none() {
        let (_folder, tree) =
            planted(&[("/proc/sys/net/ipv4/ping_group_range", "1\t0\n"), ("/proc/sys/fs/nr_open", "7\n")]);
        assert_eq!(tree.sysctl("net.ipv4.ping_group_range").as_deref(), Some("1 0"));
        assert_eq!(tree.number("fs.nr_open"), Some(7));
        assert_eq!(tree.number("net.ipv4.ping_group_range"), None);
        assert_eq!(tree.sysctl("no.such"), None);
    }
}
