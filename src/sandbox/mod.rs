//! What the kernel keeps apart for us: namespaces of users and networks, and users.
//!
//! May touch: `config`. Unsafe code lives in `sys` only. Read first: `user_namespaces(7)`,
//! `network_namespaces(7)`, `setns(2)`.

pub mod namespaces;
#[expect(unsafe_code, reason = "system calls the libraries do not wrap")]
mod sys;
pub mod user;
