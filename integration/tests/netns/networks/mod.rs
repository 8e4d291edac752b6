//! Named networks: several VMs on one bridge of the host, and what of it lives and dies with their processes.

mod kills;
mod leaks;
mod names;
mod reach;
mod rootless;
mod site;
