//! The control API as its clients meet it: the real program, the real socket. What needs a guest is in
//! `integration/tests/netns/control.rs`.

mod backend;
mod bounds;
mod capture;
mod description;
mod endpoints;
mod hostile;
mod metrics;
mod resources;
mod settings;
mod top;
