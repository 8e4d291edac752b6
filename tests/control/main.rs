//! The control API as its clients meet it: the real program, the real socket. What needs a guest is in
//! `integration/tests/netns/control.rs`.

mod backend;
mod bounds;
mod description;
mod metrics;
mod resources;
mod settings;
mod top;
