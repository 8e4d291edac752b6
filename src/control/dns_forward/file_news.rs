//! News of one file, whatever becomes of it: written in place, replaced by a rename, a symlink to another
//! file, gone and come back.
//!
//! inotify watches what exists. So watched are the file itself, the directory of each name on the way to it
//! (the path is often a symlink into `/run`), and where such a directory is missing, the nearest one above
//! it. Each piece of news ends the watch; the next one begins at what is there then.
//!
//! Read first: inotify(7).

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use inotify::{Event, EventMask, Inotify, WatchDescriptor, WatchMask};

use crate::uplink::sys::readable::Readable;

/// Symlinks followed from one to the next; the kernel itself follows 40, and files of this kind have one.
const LINKS_MAX: usize = 8;
/// Bytes of events read at once.
const EVENTS_BYTES: usize = 4096;

/// A watch on a file, good for one piece of news.
#[derive(Debug)]
pub(super) struct FileNews {
    inotify: Inotify,
    readable: Readable,
    /// Names that count in each directory. The file's own watch has none: all of its events count.
    names: HashMap<WatchDescriptor, Vec<OsString>>,
}

impl FileNews {
    /// Watches `path`, which need not exist. What changes from now on is news.
    ///
    /// # Errors
    /// No inotify instance or watch is left (`fs.inotify.max_user_instances`, `max_user_watches`).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn of(path: &Path) -> io::Result<FileNews> {
        let inotify = Inotify::init()?;
        let mut watches = inotify.watches();
        let in_directory = WatchMask::CREATE
            | WatchMask::CLOSE_WRITE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF
            | WatchMask::ONLYDIR;
        let mut names: HashMap<WatchDescriptor, Vec<OsString>> = HashMap::new();
        for (directory, name) in places(path) {
            match watches.add(&directory, in_directory) {
                Ok(watch) => names.entry(watch).or_default().push(name),
                // Gone just now: the one above it tells.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        // Of a file mounted over the name, its directory hears nothing.
        let file = WatchMask::MODIFY
            | WatchMask::CLOSE_WRITE
            | WatchMask::ATTRIB
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF;
        if let Ok(watch) = watches.add(path, file) {
            names.insert(watch, Vec::new());
        }
        let readable = Readable::of(inotify.as_fd())?;
        Ok(FileNews { inotify, readable, names })
    }

    /// Waits for news.
    ///
    /// # Errors
    /// The kernel's; nothing more will come.
    pub(super) async fn wait(self) -> io::Result<()> {
        let FileNews { mut inotify, readable, names } = self;
        let mut buffer = [0; EVENTS_BYTES];
        while !readable
            .read(|| Ok(inotify.read_events(&mut buffer)?.any(|event| is_news(&names, &event))))
            .await?
        {}
        Ok(())
    }
}

fn is_news(names: &HashMap<WatchDescriptor, Vec<OsString>>, event: &Event<&OsStr>) -> bool {
    match (names.get(&event.wd), event.name) {
        (Some(names), Some(name)) => names.is_empty() || names.iter().any(|own| own == name),
        // The file's own, or of a directory as a whole.
        (Some(_), None) => true,
        // Of no watch: events were lost.
        (None, _) => event.mask.contains(EventMask::Q_OVERFLOW),
    }
}

/// Where the file would appear, disappear or be replaced: directories, and the names to look for there.
fn places(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut found = Vec::new();
    let mut at = path.to_owned();
    for _ in 0..LINKS_MAX {
        push_place(&at, &mut found);
        let Ok(target) = fs::read_link(&at) else { break };
        at = at.parent().unwrap_or(Path::new("/")).join(target);
    }
    found
}

/// The directory of `path`, or the nearest above it that exists.
fn push_place(path: &Path, found: &mut Vec<(PathBuf, OsString)>) {
    let mut at = path;
    while let (Some(directory), Some(name)) = (at.parent(), at.file_name()) {
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        let exists = directory.is_dir();
        found.push((directory.to_owned(), name.to_owned()));
        if exists {
            return;
        }
        at = directory;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    use super::*;

    fn wait_for(news: FileNews, change: impl FnOnce()) -> bool {
        change();
        let waited = async { tokio::time::timeout(Duration::from_millis(300), news.wait()).await };
        futures_block(waited).is_ok_and(|outcome| outcome.is_ok())
    }

    thread_local! {
        static RUNTIME: tokio::runtime::Runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    }

    fn futures_block<T>(work: impl Future<Output = T>) -> T {
        RUNTIME.with(|runtime| runtime.block_on(work))
    }

    fn watch(path: &Path) -> FileNews {
        RUNTIME.with(|runtime| {
            let _inside = runtime.enter();
            FileNews::of(path).unwrap()
        })
    }

    #[test]
    fn every_way_a_file_changes_is_news() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let path = at("resolv.conf");
        let write = |name: &str, text: &str| fs::write(at(name), text).unwrap();
        assert!(wait_for(watch(&path), || write("resolv.conf", "one")), "it appears");
        assert!(wait_for(watch(&path), || write("resolv.conf", "two")), "written in place");
        write("new", "three");
        assert!(wait_for(watch(&path), || fs::rename(at("new"), &path).unwrap()), "replaced");
        assert!(wait_for(watch(&path), || fs::remove_file(&path).unwrap()), "gone");
        write("target", "four");
        assert!(wait_for(watch(&path), || symlink("target", &path).unwrap()), "a symlink");
        assert!(wait_for(watch(&path), || write("target", "five")), "the symlink's file");
        write("other", "six");
        symlink("other", at("link")).unwrap();
        assert!(wait_for(watch(&path), || fs::rename(at("link"), &path).unwrap()), "another symlink");
        assert!(
            wait_for(watch(&path), || fs::rename(at("target"), at("other")).unwrap()),
            "its file replaced"
        );
    }

    #[test]
    fn a_symlink_into_directories_yet_to_be_made_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("etc")).unwrap();
        let path = at("etc/resolv.conf");
        symlink("../run/systemd/resolv.conf", &path).unwrap();
        assert!(wait_for(watch(&path), || fs::create_dir(at("run")).unwrap()));
        assert!(wait_for(watch(&path), || fs::create_dir(at("run/systemd")).unwrap()));
        assert!(wait_for(watch(&path), || fs::write(at("run/systemd/resolv.conf"), "x").unwrap()));
        assert!(wait_for(watch(&path), || fs::write(at("run/systemd/resolv.conf"), "y").unwrap()));
        assert!(wait_for(watch(&path), || fs::remove_dir_all(at("run")).unwrap()));
    }

    #[test]
    fn other_files_of_the_directory_are_no_news() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resolv.conf");
        fs::write(&path, "one").unwrap();
        assert!(!wait_for(watch(&path), || {
            for n in 0..500 {
                fs::write(dir.path().join(format!("other{n}")), "x").unwrap();
            }
        }));
    }

    #[test]
    fn symlinks_in_a_circle_come_to_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        symlink(&two, &one).unwrap();
        symlink(&one, &two).unwrap();
        assert!(wait_for(watch(&one), || fs::remove_file(&two).unwrap()));
    }
}
