// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Global errors: GERROR and GERRORN (§7.5).

use crate::spec::smmuv3::regs::Gerror;

/// The two registers: an error is active while its bits in them differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct GlobalErrors {
    /// GERROR: toggled by the SMMU.
    pub gerror: Gerror,
    /// GERRORN: toggled by software.
    pub gerrorn: Gerror,
}

impl GlobalErrors {
    /// The unacknowledged errors.
    pub fn active(self) -> Gerror {
        Gerror::from_bits(self.gerror.into_bits() ^ self.gerrorn.into_bits())
    }

    /// Makes `errors` active. Returns `false` if all of them were.
    pub(in crate::viommu::smmuv3) fn raise(&mut self, errors: Gerror) -> bool {
        let new = errors.into_bits() & !self.active().into_bits();
        self.gerror = Gerror::from_bits(self.gerror.into_bits() ^ new);
        new != 0
    }

    /// Software writes GERRORN. Only active errors can be acknowledged: other bits are ignored.
    pub(in crate::viommu::smmuv3) fn acknowledge(&mut self, value: u32) {
        let toggled = (value ^ self.gerrorn.into_bits()) & self.active().into_bits();
        self.gerrorn = Gerror::from_bits(self.gerrorn.into_bits() ^ toggled);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_toggle_and_are_acknowledged() {
        let command = Gerror::new().with_cmdq_err(true);
        let abort = Gerror::new().with_eventq_abt_err(true);
        let mut errors = GlobalErrors::default();
        assert!(errors.raise(command));
        assert!(!errors.raise(command));
        assert_eq!(errors.active(), command);
        assert!(errors.raise(abort));
        errors.acknowledge(1);
        assert_eq!(errors.active(), abort);
        // Again: the bit toggles back.
        assert!(errors.raise(command));
        assert_eq!(errors.gerror, abort);
        // Inactive bits do not become active.
        errors.acknowledge(u32::MAX);
        assert_eq!((errors.gerrorn.into_bits(), errors.active().into_bits()), (5, 1));
        errors.acknowledge(errors.gerror.into_bits());
        assert_eq!(errors.active(), Gerror::new());
    }
}
