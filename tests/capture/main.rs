//! Captures from a worker's recorder to the file, read by a parser nobody here wrote.

mod blocks;
mod reader;
mod rig;
mod sinks;
