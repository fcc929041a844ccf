// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Structures that the user passes to a driver: bytes and a type.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::host::refusal::{refuse, Outcome};
use twostage::iommufd::{
    iommu_hwpt_vtd_s1, iommu_hwpt_vtd_s1_invalidate, iommu_viommu_arm_smmuv3_invalidate, Errno,
    HwptData, HwptVtdNested, HwptVtdSecondStage, InvalidateData,
};

/// The type of [`HwptData::VtdSecondStage`]. The uAPI's types have 32 bits, so no ioctl can name
/// it.
pub(crate) const VTD_SECOND_STAGE: u64 = 1 << 32;
/// The type of [`HwptData::VtdNested`], likewise: [`VTD_S1`] followed by [`VTD_SECOND_STAGE`].
pub(super) const VTD_NESTED: u64 = VTD_SECOND_STAGE + 1;
/// The type of [`InvalidateData::VtdSecondStage`], likewise.
pub(crate) const VTD_SECOND_STAGE_INVALIDATE: u64 = 1 << 32;
/// `IOMMU_HWPT_DATA_VTD_S1`.
pub(super) const VTD_S1: u64 = iommufd_bindings::iommu_hwpt_data_type_IOMMU_HWPT_DATA_VTD_S1 as u64;
/// `IOMMU_HWPT_INVALIDATE_DATA_VTD_S1`.
pub(super) const VTD_S1_INVALIDATE: u64 =
    iommufd_bindings::iommu_hwpt_invalidate_data_type_IOMMU_HWPT_INVALIDATE_DATA_VTD_S1 as u64;

/// `IOMMU_HWPT_DATA_ARM_SMMUV3`.
pub(super) const ARM_SMMUV3: u64 =
    iommufd_bindings::iommu_hwpt_data_type_IOMMU_HWPT_DATA_ARM_SMMUV3 as u64;
/// `IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`.
pub(super) const ARM_SMMUV3_INVALIDATE: u64 =
    iommufd_bindings::iommu_hwpt_invalidate_data_type_IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3
        as u64;
/// What a later version of the uAPI may have: every driver refuses it.
const UNKNOWN: u64 = u64::MAX;

/// A structure in the user's memory (`struct iommu_user_data`).
pub(crate) trait UserData {
    /// Its type.
    fn data_type(&self) -> u64;

    /// Its length according to the user, in bytes.
    fn length(&self) -> usize;

    /// Fills `bytes` with its first bytes.
    ///
    /// # Errors
    /// `EFAULT`.
    fn read(&self, bytes: &mut [u8]) -> Outcome<()>;

    /// Writes its first bytes.
    ///
    /// # Errors
    /// `EFAULT`.
    #[cfg(any(test, feature = "selftest"))]
    fn write(&self, bytes: &[u8]) -> Outcome<()>;
}

impl dyn UserData + '_ {
    /// Reads a structure of type `data_type`, as long as this version of the uAPI defines it:
    /// missing bytes are 0. Its first version had `min` bytes (`iommu_copy_struct_from_user`).
    ///
    /// # Errors
    /// `EINVAL` another type, or an invalid length; `EFAULT`.
    pub fn read_struct<const N: usize>(&self, data_type: u64, min: usize) -> Outcome<[u8; N]> {
        let length = self.length();
        if self.data_type() != data_type || !(min..=N).contains(&length) {
            return refuse(
                Errno::EINVAL,
                format!("{length} bytes of data of type {:#x}", self.data_type()),
            );
        }
        let mut bytes = [0; N];
        // At most N, as checked.
        self.read(bytes.get_mut(..length).unwrap_or_default())?;
        Ok(bytes)
    }
}

/// An array of structures in the user's memory (`struct iommu_user_data_array`).
pub(crate) trait UserArray {
    /// The type of all of them.
    fn data_type(&self) -> u64;

    /// The length of each according to the user, in bytes.
    fn entry_length(&self) -> usize;

    /// Number of entries.
    fn count(&self) -> usize;

    /// Fills `bytes`, from the byte at `offset` of the array.
    ///
    /// # Errors
    /// `EFAULT`.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Outcome<()>;

    /// The entries, if a caller in this process has given them as VT-d's: they need not be brought
    /// into the uAPI's layout and back.
    fn vtd_entries(&self) -> Option<&[iommu_hwpt_vtd_s1_invalidate]> {
        None
    }
}

impl dyn UserArray + '_ {
    /// The structure number `index`, of type `data_type`, as [`<dyn UserData>::read_struct`].
    ///
    /// # Errors
    /// `EINVAL` another type, or an invalid length; `EFAULT`.
    pub fn read_entry<const N: usize>(
        &self,
        data_type: u64,
        index: usize,
        min: usize,
    ) -> Outcome<[u8; N]> {
        let length = self.entry_length();
        if self.data_type() != data_type || !(min..=N).contains(&length) {
            return refuse(
                Errno::EINVAL,
                format!("entries of {length} bytes, of type {:#x}", self.data_type()),
            );
        }
        let mut bytes = [0; N];
        // Neither factor has more than 32 bits.
        let offset = index as u64 * length as u64;
        // At most N, as checked.
        self.read(offset, bytes.get_mut(..length).unwrap_or_default())?;
        Ok(bytes)
    }
}

/// A structure made by a caller in this process.
#[derive(Debug)]
pub(crate) struct OwnData {
    data_type: u64,
    bytes: Vec<u8>,
}

impl OwnData {
    /// `data` in the uAPI's layout; `None` for none.
    pub fn of_hwpt(data: &HwptData) -> Option<Self> {
        let (data_type, bytes) = match data {
            HwptData::None => return None,
            HwptData::VtdS1(tables) => (VTD_S1, first_stage_bytes(tables)),
            HwptData::VtdSecondStage(tables) => (VTD_SECOND_STAGE, second_stage_bytes(tables)),
            HwptData::VtdNested(HwptVtdNested { first, second }) => {
                (VTD_NESTED, [first_stage_bytes(first), second_stage_bytes(second)].concat())
            }
            HwptData::ArmSmmuV3(entry) => (ARM_SMMUV3, words(entry.ste)),
            _ => (UNKNOWN, Vec::new()),
        };
        Some(Self { data_type, bytes })
    }
}

impl UserData for OwnData {
    fn data_type(&self) -> u64 {
        self.data_type
    }

    fn length(&self) -> usize {
        self.bytes.len()
    }

    fn read(&self, bytes: &mut [u8]) -> Outcome<()> {
        copy(&self.bytes, 0, bytes)
    }

    #[cfg(any(test, feature = "selftest"))]
    fn write(&self, _: &[u8]) -> Outcome<()> {
        refuse(Errno::EFAULT, "the structure is read-only")
    }
}

/// An array made by a caller in this process, who keeps it: each entry is brought into the uAPI's
/// layout when it is read.
#[derive(Debug)]
pub(crate) struct OwnArray<'a>(InvalidateData<'a>);

impl<'a> OwnArray<'a> {
    /// `data` in the uAPI's layout.
    pub fn of_invalidations(data: InvalidateData<'a>) -> Self {
        Self(data)
    }

    /// The bytes of the entry number `index`, if there is one. Those after its length are none.
    fn entry(&self, index: usize) -> Option<[u8; 24]> {
        match self.0 {
            InvalidateData::VtdS1(entries) | InvalidateData::VtdSecondStage(entries) => {
                entries.get(index).map(invalidation_bytes)
            }
            InvalidateData::ArmSmmuV3(commands) => {
                let [low, high] = commands.get(index)?.cmd;
                Some(zerocopy::transmute!([low.to_le(), high.to_le(), 0]))
            }
            _ => None,
        }
    }
}

impl UserArray for OwnArray<'_> {
    fn data_type(&self) -> u64 {
        match self.0 {
            InvalidateData::VtdS1(_) => VTD_S1_INVALIDATE,
            InvalidateData::VtdSecondStage(_) => VTD_SECOND_STAGE_INVALIDATE,
            InvalidateData::ArmSmmuV3(_) => ARM_SMMUV3_INVALIDATE,
            _ => UNKNOWN,
        }
    }

    fn entry_length(&self) -> usize {
        match self.0 {
            InvalidateData::ArmSmmuV3(_) => size_of::<iommu_viommu_arm_smmuv3_invalidate>(),
            _ => size_of::<iommu_hwpt_vtd_s1_invalidate>(),
        }
    }

    fn count(&self) -> usize {
        match self.0 {
            InvalidateData::VtdS1(entries) | InvalidateData::VtdSecondStage(entries) => {
                entries.len()
            }
            InvalidateData::ArmSmmuV3(commands) => commands.len(),
            _ => 0,
        }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Outcome<()> {
        let length = self.entry_length() as u64;
        let (index, within) = (offset / length, offset % length);
        // Entries are read one at a time, from their start.
        let entry = usize::try_from(index).ok().and_then(|index| self.entry(index));
        let entry = entry.as_ref().and_then(|entry| entry.get(..length as usize));
        copy(entry.unwrap_or_default(), within, bytes)
    }

    fn vtd_entries(&self) -> Option<&[iommu_hwpt_vtd_s1_invalidate]> {
        match self.0 {
            InvalidateData::VtdS1(entries) | InvalidateData::VtdSecondStage(entries) => {
                Some(entries)
            }
            _ => None,
        }
    }
}

fn copy(from: &[u8], offset: u64, to: &mut [u8]) -> Outcome<()> {
    let rest = usize::try_from(offset).ok().and_then(|offset| from.get(offset..));
    match rest.and_then(|rest| rest.get(..to.len())) {
        Some(piece) => {
            to.copy_from_slice(piece);
            Ok(())
        }
        None => refuse(Errno::EFAULT, "past the end of the structure"),
    }
}

fn first_stage_bytes(tables: &iommu_hwpt_vtd_s1) -> Vec<u8> {
    let iommu_hwpt_vtd_s1 { flags, pgtbl_addr, addr_width, __reserved } = *tables;
    join(flags, pgtbl_addr, addr_width, __reserved).to_vec()
}

/// The tables of [`first_stage_bytes`].
pub(super) fn first_stage(bytes: &[u8; 24]) -> iommu_hwpt_vtd_s1 {
    let (flags, pgtbl_addr, addr_width, __reserved) = split(bytes);
    iommu_hwpt_vtd_s1 { flags, pgtbl_addr, addr_width, __reserved }
}

fn second_stage_bytes(tables: &HwptVtdSecondStage) -> Vec<u8> {
    let HwptVtdSecondStage { pgtbl_addr, addr_width, accessed_dirty } = *tables;
    join(accessed_dirty.into(), pgtbl_addr, addr_width, 0).to_vec()
}

/// The tables of [`second_stage_bytes`].
pub(super) fn second_stage(bytes: &[u8; 24]) -> HwptVtdSecondStage {
    let (accessed_dirty, pgtbl_addr, addr_width, _) = split(bytes);
    HwptVtdSecondStage { pgtbl_addr, addr_width, accessed_dirty: accessed_dirty & 1 != 0 }
}

/// Both tables of [`VTD_NESTED`].
pub(super) fn nested(bytes: &[u8; 48]) -> HwptVtdNested {
    let [first, second]: &[[u8; 24]; 2] = zerocopy::transmute_ref!(bytes);
    HwptVtdNested { first: first_stage(first), second: second_stage(second) }
}

fn invalidation_bytes(entry: &iommu_hwpt_vtd_s1_invalidate) -> [u8; 24] {
    let iommu_hwpt_vtd_s1_invalidate { addr, npages, flags, __reserved } = *entry;
    join(addr, npages, flags, __reserved)
}

/// The bytes of the words of an SMMU's structure.
fn words(words: [u64; 2]) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// A structure of two 64-bit and two 32-bit fields, like all of VT-d's.
#[derive(FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Fields {
    a: u64,
    b: u64,
    c: u32,
    d: u32,
}

/// The bytes of a structure with these fields.
fn join(a: u64, b: u64, c: u32, d: u32) -> [u8; 24] {
    zerocopy::transmute!(Fields { a, b, c, d })
}

/// The fields that [`join`] combines.
pub(super) fn split(bytes: &[u8; 24]) -> (u64, u64, u32, u32) {
    let Fields { a, b, c, d } = zerocopy::transmute!(*bytes);
    (a, b, c, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_is_extended_with_zeroes_up_to_what_is_known_and_no_further() {
        let of_length = |length: usize| OwnData { data_type: 7, bytes: vec![1; length] };
        let read = |data: &dyn UserData| data.read_struct::<8>(7, 4);
        assert_eq!(read(&of_length(4)).unwrap(), [1, 1, 1, 1, 0, 0, 0, 0]);
        assert_eq!(read(&of_length(8)).unwrap(), [1; 8]);
        for length in [0, 3, 9] {
            assert_eq!(read(&of_length(length)).unwrap_err().errno, Errno::EINVAL, "{length}");
        }
        let other: &dyn UserData = &of_length(8);
        assert_eq!(other.read_struct::<8>(6, 4).unwrap_err().errno, Errno::EINVAL);
    }

    #[test]
    fn both_stages_of_nested_tables_come_back_as_they_were() {
        let first = iommu_hwpt_vtd_s1 {
            flags: 1,
            pgtbl_addr: 0x2000,
            addr_width: 48,
            ..Default::default()
        };
        let second =
            HwptVtdSecondStage { pgtbl_addr: 0x3000, addr_width: 39, accessed_dirty: true };
        let both = HwptVtdNested { first, second };
        let data = OwnData::of_hwpt(&HwptData::VtdNested(both)).unwrap();
        let data: &dyn UserData = &data;
        assert_eq!(nested(&data.read_struct(VTD_NESTED, 48).unwrap()), both);
        assert_eq!(data.read_struct::<24>(VTD_S1, 24).unwrap_err().errno, Errno::EINVAL);
    }

    #[test]
    fn entries_are_found_by_their_number() {
        let entry = |addr| iommu_hwpt_vtd_s1_invalidate { addr, ..Default::default() };
        let list = [entry(1), entry(2)];
        let array = OwnArray::of_invalidations(InvalidateData::VtdS1(&list));
        let array: &dyn UserArray = &array;
        let read = |index| array.read_entry(VTD_S1_INVALIDATE, index, 24);
        assert_eq!(split(&read(1).unwrap()), (2, 0, 0, 0));
        assert_eq!(read(2).unwrap_err().errno, Errno::EFAULT, "there is no third");
    }
}
