// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who is charged for pinned memory: `IOMMU_OPTION_RLIMIT_MODE`, `IOMMU_IOAS_CHANGE_PROCESS`.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Object, Objects};
use crate::host::refusal::{refuse, Outcome};
use crate::host::user_space::Credentials;
use crate::ioas::{Pages, RlimitMode, Source};
use twostage::iommufd::Errno;

impl Objects {
    /// `IOMMU_OPTION_RLIMIT_MODE`, read.
    pub fn rlimit_mode(&self) -> RlimitMode {
        self.rlimit_mode
    }

    /// `IOMMU_OPTION_RLIMIT_MODE`, set; only before there are objects.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_RESOURCE`; `EBUSY` there are objects; `EINVAL` no such mode.
    pub fn set_rlimit_mode(&mut self, who: &Credentials, mode: u64) -> Outcome<()> {
        if !who.sys_resource {
            return refuse(Errno::EPERM, "the process lacks CAP_SYS_RESOURCE");
        }
        if self.table.len() > 0 {
            return refuse(Errno::EBUSY, "there are objects already");
        }
        self.rlimit_mode = match mode {
            0 => RlimitMode::User,
            1 => RlimitMode::Process,
            _ => return refuse(Errno::EINVAL, format!("there is no mode {mode}")),
        };
        Ok(())
    }

    /// `IOMMU_IOAS_CHANGE_PROCESS`: charges `who` for pinned pages of files from now on.
    ///
    /// # Errors
    /// `EINVAL` something other than files is mapped; `ENOMEM` the memory-lock limit of `who`.
    pub fn ioas_change_process(&mut self, who: &Credentials) -> Outcome<()> {
        let mut files: BTreeMap<*const Pages, &Arc<Pages>> = BTreeMap::new();
        for (id, object) in self.table.iter() {
            let Object::Ioas(ioas) = object else { continue };
            for (start, area) in ioas.space.areas() {
                if !matches!(area.pages.source(), Source::File(..)) {
                    return refuse(
                        Errno::EINVAL,
                        format!("IOAS {id} maps memory of a process at {start:#x}"),
                    );
                }
                files.insert(Arc::as_ptr(&area.pages), &area.pages);
            }
        }
        let mut payers = Vec::new();
        for pages in files.values() {
            match pages.charge_also(who) {
                Ok(payer) => payers.extend(payer.map(|payer| (*pages, payer))),
                Err(refusal) => {
                    payers.iter().for_each(|(pages, payer)| pages.discharge(payer));
                    return Err(refusal);
                }
            }
        }
        payers.into_iter().for_each(|(pages, payer)| pages.settle(payer));
        Ok(())
    }
}
