//! Tests of the packet type, its wire format, and transcripts, against the specification in the README.

// `cfg(test)` tells Clippy that helpers outside test functions may unwrap too.
#[cfg(test)]
mod attacks;
#[cfg(test)]
mod compact;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod packet;
#[cfg(test)]
mod payloads;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod support;
#[cfg(test)]
mod transcript;
#[cfg(test)]
mod wire;
