//! The published ports that settings speak of, as the settings change while the process runs. Those that clients of the
//! control API published are none of them.
//!
//! May touch: `ports`.

use std::collections::HashMap;

use super::ports::{PortError, Ports};
use crate::config::Publish;

/// Ports with their numbers.
type Numbered = Vec<(Publish, u64)>;

/// They.
#[derive(Debug)]
pub struct PortsOfSettings {
    ports: Ports,
    /// As the settings have them, which may leave the host's port open, and their numbers.
    known: Numbered,
}

impl PortsOfSettings {
    /// Those of the start, `asked` in the order in which `ports` has them.
    pub async fn new(ports: Ports, asked: Vec<Publish>) -> PortsOfSettings {
        let numbers = ports.list().await.into_iter().map(|published| published.id);
        PortsOfSettings { known: asked.into_iter().zip(numbers).collect(), ports }
    }

    /// Has what is `wanted`, and nothing else of the settings', published. What was and stays is not touched.
    ///
    /// # Errors
    /// [`PortError`]; then everything is as it was, but that ports which were in the way of new ones were gone meanwhile.
    pub async fn change(&mut self, wanted: &[Publish]) -> Result<(), PortError> {
        let (stays, gone, more) = self.compared(wanted);
        let (in_the_way, rest): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(|(port, _)| more.iter().any(|new| new.collides(port)));
        for (_, id) in &in_the_way {
            self.remove(*id).await?;
        }
        let made = self.ports.publish(more.clone()).await;
        self.known = stays;
        let made = match made {
            Ok(made) => made,
            Err(error) => {
                self.known.extend(rest);
                self.take_back(in_the_way).await;
                return Err(error);
            }
        };
        self.known.extend(more.into_iter().zip(made.into_iter().map(|published| published.id)));
        for (port, id) in rest {
            if let Err(error) = self.remove(id).await {
                tracing::warn!(%port, %error, "a port the settings have no more");
            }
        }
        Ok(())
    }

    /// What stays as it is, what goes and what comes. A port that the host picks can be asked for more than once.
    fn compared(&self, wanted: &[Publish]) -> (Numbered, Numbered, Vec<Publish>) {
        let mut missing: HashMap<Publish, usize> = HashMap::new();
        for port in wanted {
            *missing.entry(*port).or_default() += 1;
        }
        let mut take = |port: &Publish| match missing.get_mut(port) {
            Some(count) if *count > 0 => {
                *count -= 1;
                true
            }
            _ => false,
        };
        let (stays, gone) = self.known.iter().copied().partition(|(port, _)| take(port));
        let more = wanted.iter().copied().filter(take).collect();
        (stays, gone, more)
    }

    /// Open connections end with their port, as with `vunet ctl unpublish`, wherever they can be ended.
    async fn remove(&self, id: u64) -> Result<(), PortError> {
        match self.ports.remove(id, true).await {
            Err(PortError::CannotClose(_)) => self.ports.remove(id, false).await.map(|_| ()),
            Err(error @ PortError::NotEnded(..)) => {
                tracing::warn!(%error, "a port of the settings");
                Ok(())
            }
            outcome => outcome.map(|_| ()),
        }
    }

    /// Publishes again what was in the way.
    async fn take_back(&mut self, ports: Numbered) {
        for (port, _) in ports {
            match self.ports.publish(vec![port]).await {
                Ok(made) => self.known.extend(made.into_iter().map(|published| (port, published.id))),
                Err(error) => tracing::error!(%port, %error, "a port that was published is so no more"),
            }
        }
    }
}
