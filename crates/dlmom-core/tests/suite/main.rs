//! Properties, oracles and golden files of the crate's public interface.

#[cfg(test)]
mod common;
#[cfg(test)]
mod consensus;
#[cfg(test)]
mod controller;
#[cfg(test)]
mod noise;
#[cfg(test)]
mod options;
#[cfg(test)]
mod random;
#[cfg(test)]
mod ranks;
#[cfg(test)]
mod readout;
#[cfg(test)]
mod rows;
#[cfg(test)]
mod sampling;
#[cfg(test)]
mod specs;
#[cfg(test)]
mod transcription;
