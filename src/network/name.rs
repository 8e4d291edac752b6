//! The name of a named network: one label of the domain name system.
//!
//! It names a folder of the state directory and is part of every guest's full name
//! (`vm1.NETWORK.vunet.internal`), so it is what both can hold.
//!
//! Read first: RFC 1123, 2.1.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// One lower-case label: letters, digits and inner hyphens, 1 to 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(String);

impl NetworkName {
    /// The label.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text names no network.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{0:?} is no name for a network: use 1 to 63 lower-case letters, digits and hyphens, with no hyphen at \
     either end"
)]
pub struct NetworkNameError(pub String);

impl FromStr for NetworkName {
    type Err = NetworkNameError;

    fn from_str(text: &str) -> Result<NetworkName, NetworkNameError> {
        if is_label(text.as_bytes()) {
            Ok(NetworkName(text.to_owned()))
        } else {
            // What is much too long is not worth repeating.
            Err(NetworkNameError(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whether `bytes` are one lower-case label of a host name (RFC 1123, 2.1).
pub fn is_label(bytes: &[u8]) -> bool {
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-')
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_lower_case_label() {
        for good in ["a", "lab", "lab-2", "7", &"x".repeat(63)] {
            assert_eq!(good.parse::<NetworkName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "a-", "Lab", "a.b", "a/b", "..", "a b", "ä", "a\0", &"x".repeat(64)] {
            assert!(bad.parse::<NetworkName>().is_err(), "{bad:?}");
        }
    }
}
