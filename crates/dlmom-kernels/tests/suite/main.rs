//! The fused kernel against `dlmom_core::read_row`, an oracle in f64, and itself.

#[cfg(test)]
mod common;
#[cfg(test)]
mod edges;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod same_bits;
