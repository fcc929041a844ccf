// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Programs of those who have the packages' documentation alone: somebody who wires the parts and
//! makes mistakes, and a VMM of cloud-hypervisor's types. What else they wrote are the packages'
//! examples.

mod adapter;
mod cloud_hypervisor;
mod life;
mod wiring;
