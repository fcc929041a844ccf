// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Kernel images of an arm64 machine, and the state the first vCPU starts in.

use vm_memory::{Bytes, GuestAddress};

use super::layout::RAM_START;
use crate::arch::arm64_image::Header;
pub use crate::arch::arm64_image::ImageError;
use crate::boot::{BootInfo, Module};
use crate::memory::MachineMemory;

/// Address of the device tree: at the start of RAM; a kernel may map 2 MiB of it.
pub const DEVICE_TREE_START: u64 = RAM_START;
/// Maximum length, in bytes.
pub const DEVICE_TREE_SIZE: u64 = 2 << 20;
/// Kernels are loaded from here up, at the address they ask for.
const KERNEL_BASE: u64 = DEVICE_TREE_START + DEVICE_TREE_SIZE;
/// A machine that boots has more memory than this, in bytes.
pub const MEMORY_MIN: u64 = DEVICE_TREE_SIZE;
/// Maximum length of the command line, in bytes: Linux's limit, including the zero at its end.
const CMDLINE_SIZE: usize = 2048;
/// No kernel here takes modules with command lines.
pub const MODULE_CMDLINE_MAX: usize = 0;
/// A kernel finds its initramfs within so many bytes of itself.
const MODULE_WINDOW: u64 = 32 << 30;

/// The first vCPU's initial registers, and what the device tree says about boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartState {
    /// Where it starts.
    pub pc: u64,
    /// Guest-physical address of the device tree.
    pub device_tree: u64,
    /// The initramfs.
    pub initramfs: Option<Module>,
}

/// A kernel image with a valid header.
pub(crate) struct Image<'a> {
    bytes: &'a [u8],
    header: Header,
}

impl<'a> Image<'a> {
    /// Parses the file `bytes`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ImageError> {
        Ok(Self { bytes, header: Header::parse(bytes)? })
    }

    fn start(&self) -> u64 {
        KERNEL_BASE.saturating_add(self.header.text_offset)
    }

    fn end(&self) -> u64 {
        self.start().saturating_add(self.header.memory_size)
    }

    /// Checks that the kernel's memory is RAM and does not overlap the boot information.
    ///
    /// # Errors
    /// It does not.
    pub fn check(&self, memory: &MachineMemory) -> Result<(), ImageError> {
        let (start, end) = (self.start(), self.end());
        match memory.contains(start, end - start) {
            true => Ok(()),
            false => Err(ImageError::NoRoom { start, end }),
        }
    }

    /// Maximum length of the command line, in bytes, without the zero at its end.
    pub fn cmdline_max(&self) -> usize {
        CMDLINE_SIZE - 1
    }

    /// Maximum number of modules: the initramfs.
    pub fn modules_max(&self) -> usize {
        1
    }

    /// Allowed range for a module: from the end of the kernel to the last address it can reach.
    pub fn module_range(&self, memory: &MachineMemory) -> (u64, u64) {
        (self.end(), RAM_START + memory.low_size().min(MODULE_WINDOW))
    }

    /// Loads the kernel. The device tree has the rest of the boot information.
    ///
    /// # Errors
    /// The kernel cannot be loaded.
    pub fn load(&self, info: &BootInfo<'_>) -> Result<StartState, ImageError> {
        let pc = self.start();
        // The rest is zero, as guest memory is initially.
        info.memory.map().write_slice(self.bytes, GuestAddress(pc))?;
        Ok(StartState { pc, device_tree: DEVICE_TREE_START, initramfs: info.initramfs() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::arm64_image::testing::image;
    use crate::boot::NamedModule;

    #[test]
    fn a_kernel_lies_where_it_says_behind_the_device_tree() {
        let memory = MachineMemory::new(8 << 20).unwrap();
        let bytes = image(0x8_0000, 0x2_0000, b"code");
        let kernel = Image::parse(&bytes).unwrap();
        kernel.check(&memory).unwrap();
        let module = Module { start: RAM_START + (7 << 20), length: 5 };
        let modules = [NamedModule { memory: module, name: "files", cmdline: "" }];
        let info = BootInfo { memory: &memory, cmdline: "", name: "kernel", modules: &modules };
        let start = kernel.load(&info).unwrap();
        assert_eq!(start.pc, RAM_START + (2 << 20) + 0x8_0000);
        assert_eq!((start.device_tree, start.initramfs), (RAM_START, Some(module)));
        let mut code = vec![0; bytes.len()];
        memory.map().read_slice(&mut code, GuestAddress(start.pc)).unwrap();
        assert_eq!(code, bytes);
        assert_eq!(kernel.module_range(&memory), (start.pc + 0x2_0000, RAM_START + (8 << 20)));
    }

    #[test]
    fn a_kernel_that_is_not_in_ram_is_refused() {
        let memory = MachineMemory::new(8 << 20).unwrap();
        for (offset, size) in [(0, 7 << 20), (8 << 20, 0x1000), (u64::MAX - 0xfff, 0x1000)] {
            let bytes = image(offset, size, b"code");
            let error = Image::parse(&bytes).unwrap().check(&memory).unwrap_err();
            assert!(error.to_string().contains("not RAM"), "{error}");
        }
    }
}
