//! The named networks of a state directory: made, listed, joined, removed.
//!
//! Locks, always taken in this order: the run folder of one network, then `create.lock` or `host.lock` of
//! the state directory. Run folders of further networks are only tried, never waited for.
//!
//! May touch: `network`, `uplink` through [`life`], `uplink::published` to say whose a port is.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::clock::SystemClock;
use super::definition::{self, Definition, DefinitionError};
use super::file_lock;
use super::life::{self, LifeError};
use super::name::NetworkName;
use super::rootless::Place;
use super::state_dir::{StateDir, StateDirError};
use super::store::processes;
use super::users::{Membership, PublishedPort, RunFolder, User};
use crate::config::Publish;
use crate::uplink::port_owner;
use crate::uplink::published::{BindError, Obstacle};

/// Lock of making networks, in the state directory.
const CREATE_LOCK_NAME: &str = "create.lock";

/// Why something could not be done with a named network.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// The state directory.
    #[error(transparent)]
    StateDir(#[from] StateDirError),
    /// The definition.
    #[error(transparent)]
    Definition(#[from] DefinitionError),
    /// What it is on the host.
    #[error("network {name}")]
    Life {
        /// Its name.
        name: NetworkName,
        /// What failed.
        source: LifeError,
    },
    /// There is none of this name.
    #[error("there is no network {name} in {}: {hint}", place.display())]
    Unknown {
        /// The name.
        name: NetworkName,
        /// Where it was looked for.
        place: PathBuf,
        /// Those there are.
        hint: String,
    },
    /// There is one already.
    #[error(
        "there is a network {0} already: choose another name, or remove it with `vunet network remove {0}`"
    )]
    Exists(NetworkName),
    /// It is used.
    #[error("network {name} is in use by {}: end {} first", pids(.users), if users.len() == 1 { "it" } else { "them" })]
    InUse {
        /// Its name.
        name: NetworkName,
        /// By whom.
        users: Vec<User>,
    },
    /// It is up in another network namespace.
    #[error(
        "network {name} is up in another network namespace, by {}: a network is in one at a time; run this \
         process there, or give it another --state-dir", pids(.users)
    )]
    OtherNamespace {
        /// Its name.
        name: NetworkName,
        /// By whom.
        users: Vec<User>,
    },
    /// A file or lock of the network.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// Users as a text: `process 7`, `processes 7, 9`.
fn pids(users: &[User]) -> String {
    let pids: Vec<String> = users.iter().map(|user| user.pid.to_string()).collect();
    format!("{} {}", if pids.len() == 1 { "process" } else { "processes" }, pids.join(", "))
}

/// A process of a named network that has published a port.
#[derive(Clone, Debug)]
pub struct Publisher {
    network: NetworkName,
    user: User,
}

impl Publisher {
    /// Has the refusal of a port that is taken say that this process has it.
    pub fn name_in(&self, refused: &mut BindError) {
        let Obstacle::Taken { owner, network_user } = &mut refused.why else { return };
        let (pid, socket) = (self.user.pid, self.user.socket.as_ref());
        let socket = socket.map(|path| format!(" ({})", path.display())).unwrap_or_default();
        let network = &self.network;
        *network_user = Some(format!("process {pid}{socket} of network {network}, which has published it"));
        // Where a holder serves it, the holder has the socket too.
        if let Some(owner) = owner {
            owner.process = Some(port_owner::process(pid));
        }
    }
}

/// The named networks of a state directory.
#[derive(Clone, Debug)]
pub struct Networks {
    state: StateDir,
}

impl Networks {
    /// Those of `state`.
    pub fn new(state: StateDir) -> Networks {
        Networks { state }
    }

    /// The state directory.
    pub fn state(&self) -> &StateDir {
        &self.state
    }

    /// Where a network keeps its files.
    pub fn folder(&self, name: &NetworkName) -> PathBuf {
        self.state.network(name)
    }

    /// Where the holder of a rootless network is found.
    pub fn holder(&self, name: &NetworkName) -> Place {
        let state = self.state.path().display().to_string();
        let arguments = ["network", "hold", name.as_str(), "--state-dir", &state];
        Place { folder: self.folder(name), arguments: arguments.map(str::to_owned).to_vec() }
    }

    /// All networks, in order of their names.
    ///
    /// # Errors
    /// A folder or definition that cannot be read.
    pub fn all(&self) -> Result<Vec<Definition>, NetworkError> {
        let mut all = Vec::new();
        for name in self.state.networks()? {
            all.extend(definition::load(&self.folder(&name), &name)?);
        }
        Ok(all)
    }

    /// The network `name`.
    ///
    /// # Errors
    /// [`NetworkError::Unknown`], or a definition that cannot be read.
    pub fn find(&self, name: &NetworkName) -> Result<Definition, NetworkError> {
        match definition::load(&self.folder(name), name)? {
            Some(definition) => Ok(definition),
            None => Err(self.unknown(name)),
        }
    }

    fn unknown(&self, name: &NetworkName) -> NetworkError {
        let known: Vec<String> =
            self.all().unwrap_or_default().iter().map(|known| known.name.to_string()).collect();
        let create = format!("make it with `vunet network create {name} --mode nat` (or host-only, bridge)");
        let hint = if known.is_empty() { create } else { format!("there is {}; {create}", known.join(", ")) };
        NetworkError::Unknown { name: name.clone(), place: self.state.path().to_owned(), hint }
    }

    /// Makes the network that `choose` makes of those there are; nobody else makes one meanwhile.
    ///
    /// # Errors
    /// [`NetworkError::Exists`], whatever `choose` says, or the file system's refusal.
    pub fn create<E: From<NetworkError>>(
        &self,
        name: &NetworkName,
        choose: impl FnOnce(&[Definition]) -> Result<Definition, E>,
    ) -> Result<Definition, E> {
        let _alone = self.lock(CREATE_LOCK_NAME)?;
        let others = self.all()?;
        if others.iter().any(|other| other.name == *name) {
            return Err(NetworkError::Exists(name.clone()).into());
        }
        let definition = choose(&others)?;
        let folder = self.folder(name);
        // What a removal that was cut short left would be taken for this network's.
        remove_folder(&folder)?;
        self.state.make_network(name).map_err(NetworkError::from)?;
        definition::store(&folder, &definition).map_err(NetworkError::from)?;
        Ok(definition)
    }

    /// Removes the network `name`, with its leases.
    ///
    /// # Errors
    /// [`NetworkError::InUse`], [`NetworkError::Unknown`], or what of it could not be removed.
    pub fn remove(&self, name: &NetworkName) -> Result<Definition, NetworkError> {
        let (run, definition) = self.locked(name)?;
        let users = self.users_of(&run, name)?;
        if !users.is_empty() {
            return Err(NetworkError::InUse { name: name.clone(), users });
        }
        self.lower(&definition)?;
        if definition.is_rootless() {
            self.holder(name).end().map_err(self.file_error("end the holder that has", name))?;
        }
        let _alone = self.lock(CREATE_LOCK_NAME)?;
        let folder = self.folder(name);
        let path = folder.join(definition::FILE_NAME);
        // Without it there is no such network, whatever else is left after a crash.
        fs::remove_file(&path).map_err(|source| NetworkError::File { what: "remove", path, source })?;
        remove_folder(&folder)?;
        Ok(definition)
    }

    /// Who uses the network `name`.
    ///
    /// # Errors
    /// [`NetworkError::Unknown`], or the file system's refusal.
    pub fn users(&self, name: &NetworkName) -> Result<Vec<User>, NetworkError> {
        let (run, _) = self.locked(name)?;
        self.users_of(&run, name)
    }

    /// Who of all processes of these networks has published this end of the host.
    ///
    /// What cannot be read is passed over: this only explains a refusal.
    pub fn publisher(&self, wanted: &Publish) -> Option<Publisher> {
        let is_it = |port: &PublishedPort| Publish::from(port).collides(wanted);
        self.all().ok()?.into_iter().find_map(|Definition { name: network, .. }| {
            let users = self.users(&network).unwrap_or_default();
            let user = users.into_iter().find(|user| user.published.iter().any(is_it))?;
            Some(Publisher { network, user })
        })
    }

    /// Makes this process one of the users of the network `name`, and the network if it is the first.
    ///
    /// # Errors
    /// [`NetworkError`]; nothing is left behind then.
    pub fn join(&self, name: &NetworkName, user: User) -> Result<Joined, NetworkError> {
        self.sweep(Some(name));
        let (run, definition) = self.locked(name)?;
        let mut users = self.users_of(&run, name)?;
        if users.iter().any(|other| other.net_namespace != user.net_namespace) {
            return Err(NetworkError::OtherNamespace { name: name.clone(), users });
        }
        if users.is_empty() && self.lower(&definition)? {
            tracing::info!(network = %name, "cleaned up what processes that were killed left");
        }
        let membership = run.join(&user).map_err(self.file_error("write to", name))?;
        users.push(user.clone());
        self.let_go(&run, &definition, &users);
        let joined =
            Joined { networks: self.clone(), definition, user, membership: Some(membership), keeper: None };
        // If it fails, dropping what was joined leaves, and removes what was made.
        let raised = life::raise(self.state.path(), &joined.definition, &users);
        drop(run);
        raised.map_err(|source| NetworkError::Life { name: name.clone(), source })?;
        Ok(joined)
    }

    /// Cleans up after networks whose processes were all killed. One that cannot be cleaned up is told of and
    /// left to whoever joins or removes it.
    pub fn sweep(&self, but: Option<&NetworkName>) {
        // One that cannot be read, as of another version, keeps nobody from cleaning up after the others.
        let read = |name| definition::load(&self.folder(name), name).ok().flatten();
        let names = self.state.networks().unwrap_or_default();
        for definition in names.iter().filter(|name| Some(*name) != but).filter_map(read) {
            // One that is locked has somebody who takes care of it.
            let Ok(Some(run)) = RunFolder::try_lock(&self.folder(&definition.name)) else { continue };
            let Ok(users) = run.users() else { continue };
            self.let_go(&run, &definition, &users);
            if users.is_empty() {
                match life::lower(self.state.path(), &definition) {
                    Ok(false) => {}
                    Ok(true) => tracing::info!(network = %definition.name, "cleaned up what was left"),
                    Err(error) => {
                        tracing::warn!(network = %definition.name, %error, "cannot clean up what was left");
                    }
                }
            }
        }
    }

    /// Lets go the leases of processes that are not among `users`, which are all that live. What cannot be done is
    /// told of, and left to whoever looks next: nobody else needs these leases now.
    fn let_go(&self, _run: &RunFolder, definition: &Definition, users: &[User]) {
        if definition.kind.lan().is_none() {
            return;
        }
        let network = &definition.name;
        let live: Vec<u64> = users.iter().filter_map(|user| user.holder).collect();
        let clock = match SystemClock::new() {
            Ok(clock) => clock,
            Err(error) => return tracing::warn!(%network, %error, "cannot tell this boot from others"),
        };
        match processes::let_go(&self.folder(network), &live, &clock) {
            Ok(0) => {}
            Ok(leases) => tracing::info!(%network, leases, "let go the leases of processes that are gone"),
            Err(error) => {
                tracing::warn!(%network, %error, "the leases of processes that are gone stay for now");
            }
        }
    }

    fn lower(&self, definition: &Definition) -> Result<bool, NetworkError> {
        life::lower(self.state.path(), definition)
            .map_err(|source| NetworkError::Life { name: definition.name.clone(), source })
    }

    /// The run folder of a network that exists, locked.
    fn locked(&self, name: &NetworkName) -> Result<(RunFolder, Definition), NetworkError> {
        self.find(name)?;
        let run = match RunFolder::lock(&self.folder(name)) {
            // Removed just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.unknown(name)),
            outcome => outcome.map_err(self.file_error("lock", name))?,
        };
        // Whoever had the lock before may have removed it.
        let definition = self.find(name)?;
        Ok((run, definition))
    }

    fn users_of(&self, run: &RunFolder, name: &NetworkName) -> Result<Vec<User>, NetworkError> {
        run.users().map_err(self.file_error("read", name))
    }

    fn file_error(&self, what: &'static str, name: &NetworkName) -> impl FnOnce(io::Error) -> NetworkError {
        let path = self.folder(name).join(super::users::RUN_FOLDER);
        move |source| NetworkError::File { what, path, source }
    }

    fn lock(&self, file_name: &str) -> Result<File, NetworkError> {
        let path = self.state.path().join(file_name);
        let open = || {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
            file_lock::lock(&file).map(|()| file)
        };
        open().map_err(|source| NetworkError::File { what: "lock", path: path.clone(), source })
    }
}

/// Removes a folder with all that is in it. Somebody who looks for the network may put a lock into it
/// meanwhile, so it is tried again.
fn remove_folder(folder: &Path) -> Result<(), NetworkError> {
    const TRIES: usize = 5;
    let mut tries = 0;
    loop {
        tries += 1;
        match fs::remove_dir_all(folder) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < TRIES => {}
            Err(source) => {
                return Err(NetworkError::File { what: "remove", path: folder.to_owned(), source });
            }
        }
    }
}

/// This process as a user of a network. Dropped, it leaves; the last to leave removes the network from the
/// host.
#[derive(Debug)]
pub struct Joined {
    networks: Networks,
    definition: Definition,
    user: User,
    /// None once it left.
    membership: Option<Membership>,
    /// The lock of the one that looks after the network.
    keeper: Option<File>,
}

impl Joined {
    /// This process, as others know it.
    pub fn user(&self) -> &User {
        &self.user
    }

    /// The network.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Where the network's holder is found, if it is rootless.
    pub fn holder(&self) -> Place {
        self.networks.holder(&self.definition.name)
    }

    /// All networks of its state directory.
    pub fn networks(&self) -> &Networks {
        &self.networks
    }

    /// The folder of this network's locks, in which files of users come and go.
    pub fn run_folder(&self) -> PathBuf {
        self.networks.folder(&self.definition.name).join(super::users::RUN_FOLDER)
    }

    /// Notes what `change` makes of this process, and makes the host as the users need it then: only what
    /// depends on what changed, because fifty processes may start at once.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn update(&mut self, change: impl FnOnce(&mut User)) -> Result<(), NetworkError> {
        let before = self.user.clone();
        change(&mut self.user);
        if self.user == before {
            return Ok(());
        }
        let name = &self.definition.name;
        let run = self.lock()?;
        if let Some(membership) = &mut self.membership {
            membership.note(&run, &self.user).map_err(self.networks.file_error("write to", name))?;
        }
        if life::leads_elsewhere(&before, &self.user) {
            self.raise(&run)?;
        } else if self.user.tap != before.tap {
            life::attach(&self.definition, &self.user)
                .map_err(|source| NetworkError::Life { name: name.clone(), source })?;
        }
        Ok(())
    }

    /// The same, and if it fails nothing is changed: neither what others know nor the host.
    ///
    /// For what somebody waits for; what the network is to become by itself is left to whoever looks after it.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn try_update(&mut self, change: impl FnOnce(&mut User)) -> Result<(), NetworkError> {
        let before = self.user.clone();
        let outcome = self.update(change);
        if outcome.is_err() {
            // What of it fails again leaves the host as it was.
            let _ = self.update(|user| *user = before.clone());
            self.user = before;
        }
        outcome
    }

    /// Whether this process is the one that looks after the network; at most one of its processes is, and
    /// another is found once it is gone.
    pub fn is_keeper(&mut self) -> bool {
        if self.keeper.is_none() {
            self.keeper = RunFolder::try_keep(&self.networks.folder(&self.definition.name));
        }
        self.keeper.is_some()
    }

    /// Puts back what of the network was taken away, and takes away what dead users left. Whether rules had to
    /// be changed.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub fn restore(&self) -> Result<bool, NetworkError> {
        let run = self.lock()?;
        self.raise(&run)
    }

    fn lock(&self) -> Result<RunFolder, NetworkError> {
        let name = &self.definition.name;
        RunFolder::lock(&self.networks.folder(name)).map_err(self.networks.file_error("lock", name))
    }

    fn raise(&self, run: &RunFolder) -> Result<bool, NetworkError> {
        let name = &self.definition.name;
        let users = self.networks.users_of(run, name)?;
        self.networks.let_go(run, &self.definition, &users);
        life::raise(self.networks.state.path(), &self.definition, &users)
            .map_err(|source| NetworkError::Life { name: name.clone(), source })
    }

    fn leave(&mut self) -> Result<(), NetworkError> {
        let Some(membership) = self.membership.take() else { return Ok(()) };
        let run = self.lock()?;
        self.keeper = None;
        drop(membership);
        let users = self.networks.users_of(&run, &self.definition.name)?;
        self.networks.let_go(&run, &self.definition, &users);
        if users.is_empty() {
            self.networks.lower(&self.definition).map(drop)
        } else if life::leads_anywhere(&self.user) {
            self.raise(&run).map(drop)
        } else {
            Ok(())
        }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        if let Err(error) = self.leave() {
            let network = &self.definition.name;
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::warn!(%network, %error, cause, "cannot clean up; the next process that joins does");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::definition::{Kind, NetworkId};
    use super::super::users::RUN_FOLDER;
    use super::*;
    use crate::config::IpMtu;

    #[test]
    fn a_definition_that_cannot_be_read_keeps_nobody_from_sweeping_the_others() {
        let place = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let networks = Networks::new(StateDir::open(place.path().to_owned()).unwrap());
        let [broken, left]: [NetworkName; 2] = ["a", "b"].map(|name| name.parse().unwrap());
        for name in [&broken, &left] {
            let kind = Kind::Bridge { bridge: "br0".to_owned(), ip_mtu: IpMtu::DEFAULT, isolate: false };
            let definition = Definition { name: name.clone(), id: NetworkId::random().unwrap(), kind };
            networks.create(name, |_| Ok::<_, NetworkError>(definition)).unwrap();
        }
        fs::write(networks.folder(&broken).join(definition::FILE_NAME), "version = 99").unwrap();
        let run = networks.folder(&left).join(RUN_FOLDER);
        fs::create_dir(&run).unwrap();
        fs::write(run.join("user-9-0"), "{}").unwrap();
        networks.sweep(None);
        assert!(!run.join("user-9-0").exists(), "what the dead left is gone");
    }
}
