//! Frames both ways under every mixture of features.
