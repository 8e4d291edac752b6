//! The resolvers that the guest's questions go to, each asked one question.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::check::{Check, Fix, State};
use super::way::Asked;
use crate::control::dns_forward::Upstreams;
use crate::control::dns_forward::probe::{self, Asked as Outcome};

/// How long a resolver has to answer; what the guest's own waits at least.
pub(super) const ANSWER: Duration = Duration::from_secs(2);

/// What is known of the resolvers.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// The file they are in; none where they are given by hand.
    pub(super) file: Option<PathBuf>,
    /// Them, with what became of a question unless none was asked; or why the file cannot be read.
    pub(super) servers: Result<Vec<(SocketAddr, Option<Outcome>)>, io::ErrorKind>,
}

impl Names {
    /// Reads the file unless resolvers are `given`, and asks all of them at once if `online`. Needs a tokio runtime.
    pub(super) async fn read(file: PathBuf, given: &[SocketAddr], online: bool) -> Names {
        let (file, servers) = match given {
            [] => {
                let found = probe::resolvers(&file);
                (Some(file), found)
            }
            given => (None, Ok(given.to_vec())),
        };
        let servers = match servers {
            Ok(servers) => servers,
            Err(error) => return Names { file, servers: Err(error.kind()) },
        };
        let ask = |addr| async move {
            let outcome = if online { Some(probe::ask(addr, ANSWER).await) } else { None };
            (addr, outcome)
        };
        Names { file, servers: Ok(futures_util::future::join_all(servers.into_iter().map(ask)).await) }
    }

    /// Where this host says which they are.
    pub(super) fn host_file() -> PathBuf {
        PathBuf::from(Upstreams::RESOLV_CONF)
    }
}

/// The resolvers; no check where no names are answered.
pub(super) fn resolver(names: Option<&Names>, asked: &Asked) -> Option<Check> {
    const NAME: &str = "resolver";
    asked.dns_servers.as_ref()?;
    let Some(names) = names else {
        return Some(Check::late(NAME, State::Warn, "give --dns-server IP"));
    };
    let place = names.file.as_ref().map_or("--dns-server".to_owned(), |file| file.display().to_string());
    let hand = "give --dns-server IP";
    let servers = match &names.servers {
        Ok(servers) => servers,
        Err(io::ErrorKind::PermissionDenied) => {
            let says = format!("{place} cannot be read by this user: the guest's questions fail");
            return Some(Check::warn(NAME, says, Fix::root(format!("chmod a+r {place}"))));
        }
        Err(kind) => {
            let says = format!("{place} cannot be read ({kind}): the guest's questions fail");
            return Some(Check::warn(NAME, says, Fix::advice(hand)));
        }
    };
    if servers.is_empty() {
        let says = format!("{place} names no server: the guest's questions fail");
        return Some(Check::warn(NAME, says, Fix::advice(hand)));
    }
    let list: Vec<String> =
        servers.iter().map(|(addr, outcome)| format!("{addr} {}", words(outcome.as_ref()))).collect();
    let list = list.join(", ");
    let is_good = |outcome: &Option<Outcome>| matches!(outcome, None | Some(Outcome::Answered));
    if servers.iter().any(|(_, outcome)| is_good(outcome)) {
        return Some(Check::ok(NAME, list));
    }
    let says = format!("none of {place} helps the guest: {list}");
    Some(Check::warn(
        NAME,
        says,
        Fix::advice(format!("{hand} of one that answers, or see to the host's own network")),
    ))
}

fn words(outcome: Option<&Outcome>) -> String {
    match outcome {
        None => "not asked".to_owned(),
        Some(Outcome::Answered) => "answers".to_owned(),
        Some(Outcome::Failing) => "answers with a failure".to_owned(),
        Some(Outcome::Silent) => "does not answer".to_owned(),
        Some(Outcome::Refused(why)) => format!("cannot be asked ({why})"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::planted;
    use super::*;

    fn check(servers: Result<Vec<(SocketAddr, Option<Outcome>)>, io::ErrorKind>) -> Check {
        let names = Names { file: Some(PathBuf::from("/etc/resolv.conf")), servers };
        resolver(Some(&names), &Asked::plain()).unwrap()
    }

    #[test]
    fn one_resolver_that_answers_is_enough() {
        let addr = |n| SocketAddr::from(([192, 0, 2, n], 53));
        let good = check(Ok(vec![(addr(1), Some(Outcome::Silent)), (addr(2), Some(Outcome::Answered))]));
        assert_eq!(good.state, State::Ok);
        assert!(good.says.contains("192.0.2.1:53 does not answer"), "{}", good.says);
        assert_eq!(check(Ok(vec![(addr(1), None)])).state, State::Ok, "offline");
        let bad = check(Ok(vec![(addr(1), Some(Outcome::Silent)), (addr(2), Some(Outcome::Failing))]));
        assert_eq!(bad.state, State::Warn);
        assert!(bad.fix.unwrap().line(true).contains("--dns-server IP"));
    }

    #[test]
    fn a_file_that_tells_nothing_is_said_with_what_to_do() {
        let denied = check(Err(io::ErrorKind::PermissionDenied));
        assert_eq!(
            (denied.state, denied.fix.unwrap().line(true)),
            (State::Warn, "chmod a+r /etc/resolv.conf".to_owned())
        );
        assert_eq!(check(Err(io::ErrorKind::NotFound)).state, State::Warn);
        assert!(check(Ok(Vec::new())).says.contains("names no server"));
        assert_eq!(resolver(None, &Asked::plain()).unwrap().state, State::Warn, "it hangs");
        assert_eq!(resolver(None, &Asked { dns_servers: None, ..Asked::plain() }), None, "--no-dns");
    }

    #[tokio::test]
    async fn resolvers_are_those_of_the_file_unless_they_are_given() {
        let (_folder, tree) = planted(&[("/etc/resolv.conf", "nameserver 192.0.2.1\n")]);
        let file = tree.path("/etc/resolv.conf");
        let of_file = Names::read(file.clone(), &[], false).await;
        assert_eq!(of_file.servers, Ok(vec![("192.0.2.1:53".parse().unwrap(), None)]));
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let given = Names::read(file, &[free], true).await;
        assert!(given.file.is_none() && matches!(given.servers.unwrap()[0].1, Some(Outcome::Refused(_))));
        let gone = Names::read(tree.path("/no/such"), &[], true).await;
        assert_eq!(gone.servers, Err(io::ErrorKind::NotFound));
    }
}
