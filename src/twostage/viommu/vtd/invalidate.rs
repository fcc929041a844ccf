// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Invalidations executed by the host, and the register-based interface (§6.5.1, §11.4.6).

use super::actions::iotlb;
use super::apply::Scope;
use super::control::Then;
use super::evaluation::By;
use super::state::Registers;
use super::VtdIommu;
use crate::spec::pci::Bdf;
use crate::spec::vtd::qi::{AddressMask, ContextScope, IotlbScope};
use crate::spec::vtd::regs::{
    Ccmd, ContextGranularity, IotlbGranularity, IotlbReg, Rtaddr, TranslationTableMode,
};
use crate::spec::vtd::PAGE_SHIFT;
use crate::viommu::vtd::host_side::{Invalidation, Progress};
use crate::viommu::HostSideError;

impl VtdIommu {
    /// Gives a batch to the host, starting at `progress`: as much of it as one slice may do.
    pub(super) fn invalidate_host(
        &self,
        batch: &[Invalidation],
        progress: &mut Progress,
    ) -> Result<(), HostSideError> {
        if progress.next().is_none() {
            self.counters.batches.count();
            self.counters.invalidations.add(batch.len() as u64);
        }
        self.host.invalidate_some(batch, progress).inspect_err(|error| {
            // What the host blocked because of it is given again at the next occasion.
            self.requesters.unapply_all();
            // A failed invalidation is never acknowledged, whatever happened to its requesters.
            let _ = self.host_failed(error);
        })
    }

    /// CCMD.ICC was written as 1. Afterwards ICC is cleared and CAIG reports what was done:
    /// nothing, if the register-based interface may not be used, the request is reserved or the
    /// host fails.
    pub(super) fn context_command(&self, registers: &mut Registers) {
        let command = registers.ccmd;
        let granularity = ContextGranularity::from_bits(command.cirg())
            .filter(|_| register_interface_allowed(registers));
        let scope = granularity.map(|granularity| match granularity {
            ContextGranularity::Global => ContextScope::Global,
            ContextGranularity::Domain => ContextScope::Domain(command.did()),
            ContextGranularity::Device => ContextScope::Device {
                domain: command.did(),
                source: Bdf::from_raw(command.sid()),
                function_mask: command.fm(),
            },
        });
        let (Some(scope), Some(granularity)) = (scope, granularity) else {
            let what = "a context command that is not allowed";
            self.guest_error(format_args!("{what}: {command:?}"));
            return self.acknowledge_context_command(registers, None);
        };
        if registers.gsts.tes() {
            let scope = Scope::of_contexts(scope, registers.root.map(Rtaddr::mode));
            return self.begin_command(scope, By::Tables, Then::Context(granularity));
        }
        self.acknowledge_context_command(registers, Some(granularity));
    }

    /// Clears ICC, and reports in CAIG what was done.
    pub(super) fn acknowledge_context_command(
        &self,
        registers: &mut Registers,
        done: Option<ContextGranularity>,
    ) {
        let done = done.map_or(0, ContextGranularity::into_bits);
        registers.ccmd = Ccmd::with_caig(registers.ccmd, done).with_icc(false);
    }

    /// IOTLB.IVT was written as 1. IAIG reports what was done, like CAIG.
    pub(super) fn iotlb_command(&self, registers: &mut Registers) {
        let command = registers.iotlb;
        let iva = registers.iva;
        let granularity = IotlbGranularity::from_bits(command.iirg())
            .filter(|_| register_interface_allowed(registers))
            // A mask larger than offered widens to the domain.
            .map(|granularity| match granularity {
                IotlbGranularity::Page if iva.am() > self.caps.cap.mamv() => {
                    IotlbGranularity::Domain
                }
                granularity => granularity,
            });
        let scope = granularity.map(|granularity| match granularity {
            IotlbGranularity::Global => IotlbScope::Global,
            IotlbGranularity::Domain => IotlbScope::Domain(command.did()),
            IotlbGranularity::Page => IotlbScope::Pages {
                domain: command.did(),
                range: AddressMask {
                    address: iva.addr() << PAGE_SHIFT,
                    mask: iva.am(),
                    leaf: iva.ih(),
                },
            },
        });
        let (Some(scope), Some(granularity)) = (scope, granularity) else {
            self.guest_error(format_args!("an IOTLB command that is not allowed: {command:?}"));
            return self.acknowledge_iotlb_command(registers, None);
        };
        self.begin_invalidation(iotlb(scope), Then::Iotlb(granularity));
    }

    /// Clears IVT, and reports in IAIG what was done.
    pub(super) fn acknowledge_iotlb_command(
        &self,
        registers: &mut Registers,
        done: Option<IotlbGranularity>,
    ) {
        let done = done.map_or(0, IotlbGranularity::into_bits);
        registers.iotlb = IotlbReg::with_iaig(registers.iotlb, done).with_ivt(false);
    }

    /// Whether decisions that the host lost because an invalidation failed must be given again
    /// ([`Scope::Unapplied`]). A guest that only invalidates does not ask for the lost policies.
    pub(super) fn must_reapply(&self, registers: &Registers) -> bool {
        if !self.requesters.has_unapplied() {
            return false;
        }
        if !registers.gsts.tes() {
            self.requesters.set_reapplied();
        }
        registers.gsts.tes()
    }
}

/// Whether the register-based interface may be used: not together with the queue, and not in
/// scalable mode, which has queued invalidation only (§6.5).
fn register_interface_allowed(registers: &Registers) -> bool {
    let mode = registers.root.map(Rtaddr::mode);
    !registers.gsts.qies() && mode != Some(TranslationTableMode::Scalable)
}
