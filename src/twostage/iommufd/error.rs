// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Errors of verbs: Linux's errno, the verb, the object, and what to do.

use std::borrow::Cow;
use std::fmt;

use super::ObjectId;
use crate::jail::{self, Ioctl};

/// A Linux error number, as returned by an ioctl of `/dev/iommu`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($(#[$doc:meta])* $name:ident = $value:literal),* $(,)?) => {
        impl Errno {
            $($(#[$doc])* pub const $name: Self = Self($value);)*

            /// The name of the error in `errno.h`, if iommufd uses it.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($value => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    /// The operation is not permitted.
    EPERM = 1,
    /// No such object.
    ENOENT = 2,
    /// The hardware or the page tables could not be reached.
    EIO = 5,
    /// Nothing to map.
    ENXIO = 6,
    /// An argument or structure is too large, with nonzero excess bytes.
    E2BIG = 7,
    /// No such open file.
    EBADF = 9,
    /// No memory, or the memory-lock limit is reached.
    ENOMEM = 12,
    /// Not permitted.
    EACCES = 13,
    /// A pointer is not to memory of the caller.
    EFAULT = 14,
    /// The object is in use.
    EBUSY = 16,
    /// It exists already.
    EEXIST = 17,
    /// No such device.
    ENODEV = 19,
    /// An invalid argument.
    EINVAL = 22,
    /// The process has too many open files.
    EMFILE = 24,
    /// No such ioctl.
    ENOTTY = 25,
    /// No space left in the address space or table.
    ENOSPC = 28,
    /// Not a whole number of records.
    ESPIPE = 29,
    /// A number is too large.
    ERANGE = 34,
    /// The holder does not release it.
    EDEADLK = 35,
    /// The descriptor is of another kind.
    EBADFD = 77,
    /// Not a message of the expected size.
    EMSGSIZE = 90,
    /// A reserved field or an unknown type is set.
    EOPNOTSUPP = 95,
    /// The addresses are in use or reserved.
    EADDRINUSE = 98,
    /// A value does not fit.
    EOVERFLOW = 75,
    /// The device did not answer an invalidation in time.
    ETIMEDOUT = 110,
}

impl Errno {
    /// The error number `raw`, as the kernel returned it (positive).
    pub const fn from_raw(raw: i32) -> Self {
        Self(raw)
    }

    /// The number of the error, positive.
    pub const fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! verbs {
    ($($(#[$doc:meta])* $variant:ident => $name:literal),* $(,)?) => {
        /// The verbs of [`super::HostIommu`], for errors, counters and traces.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Verb {
            $($(#[$doc])* $variant,)*
        }

        impl Verb {
            /// Every verb, in the order of its discriminant.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name of the verb in `linux/iommufd.h` or `linux/vfio.h`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

verbs! {
    /// `VFIO_DEVICE_BIND_IOMMUFD`.
    DeviceBind => "DEVICE_BIND",
    /// Closing the device.
    DeviceUnbind => "DEVICE_UNBIND",
    /// `VFIO_DEVICE_ATTACH_IOMMUFD_PT`, first attach or replace.
    DeviceAttach => "DEVICE_ATTACH",
    /// `VFIO_DEVICE_DETACH_IOMMUFD_PT`.
    DeviceDetach => "DEVICE_DETACH",
    /// `IOMMU_DESTROY`.
    Destroy => "DESTROY",
    /// `IOMMU_IOAS_ALLOC`.
    IoasAlloc => "IOAS_ALLOC",
    /// `IOMMU_IOAS_ALLOW_IOVAS`.
    IoasAllowIovas => "IOAS_ALLOW_IOVAS",
    /// `IOMMU_IOAS_IOVA_RANGES`.
    IoasIovaRanges => "IOAS_IOVA_RANGES",
    /// `IOMMU_IOAS_MAP`.
    IoasMap => "IOAS_MAP",
    /// `IOMMU_IOAS_COPY`.
    IoasCopy => "IOAS_COPY",
    /// `IOMMU_IOAS_UNMAP`.
    IoasUnmap => "IOAS_UNMAP",
    /// `IOMMU_GET_HW_INFO`.
    GetHwInfo => "GET_HW_INFO",
    /// `IOMMU_HWPT_ALLOC`.
    HwptAlloc => "HWPT_ALLOC",
    /// `IOMMU_HWPT_INVALIDATE`.
    HwptInvalidate => "HWPT_INVALIDATE",
    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`.
    HwptSetDirtyTracking => "HWPT_SET_DIRTY_TRACKING",
    /// `IOMMU_HWPT_GET_DIRTY_BITMAP`.
    HwptGetDirtyBitmap => "HWPT_GET_DIRTY_BITMAP",
    /// `IOMMU_VIOMMU_ALLOC`.
    ViommuAlloc => "VIOMMU_ALLOC",
    /// `IOMMU_VDEVICE_ALLOC`.
    VdeviceAlloc => "VDEVICE_ALLOC",
    /// `IOMMU_FAULT_QUEUE_ALLOC`.
    FaultQueueAlloc => "FAULT_QUEUE_ALLOC",
    /// Reading a fault queue.
    PageRequest => "PAGE_REQUEST",
    /// Writing to a fault queue.
    PageResponse => "PAGE_RESPONSE",
    /// `IOMMU_VEVENTQ_ALLOC`.
    VeventqAlloc => "VEVENTQ_ALLOC",
    /// Reading a vEVENTQ.
    Vevent => "VEVENT",
}

impl Verb {
    /// The ioctls of the verb on a kernel's host, for the filters of threads that call it: see
    /// [`crate::jail`].
    pub const fn ioctls(self) -> &'static [Ioctl] {
        match self {
            Self::DeviceBind => &[jail::BIND, jail::GET_HW_INFO],
            Self::DeviceAttach => &[jail::ATTACH],
            Self::DeviceUnbind | Self::DeviceDetach => &[jail::DETACH],
            Self::Destroy => &[jail::DESTROY],
            Self::IoasAlloc => &[jail::IOAS_ALLOC],
            Self::IoasAllowIovas => &[jail::IOAS_ALLOW_IOVAS],
            Self::IoasIovaRanges => &[jail::IOAS_IOVA_RANGES],
            Self::IoasMap => &[jail::IOAS_MAP, jail::IOAS_MAP_FILE],
            Self::IoasCopy => &[jail::IOAS_COPY],
            Self::IoasUnmap => &[jail::IOAS_UNMAP],
            Self::HwptAlloc => &[jail::HWPT_ALLOC],
            Self::HwptInvalidate => &[jail::HWPT_INVALIDATE],
            Self::HwptSetDirtyTracking => &[jail::HWPT_SET_DIRTY_TRACKING],
            Self::HwptGetDirtyBitmap => &[jail::HWPT_GET_DIRTY_BITMAP],
            Self::ViommuAlloc => &[jail::VIOMMU_ALLOC],
            Self::VdeviceAlloc => &[jail::VDEVICE_ALLOC],
            Self::FaultQueueAlloc => &[jail::FAULT_QUEUE_ALLOC],
            Self::VeventqAlloc => &[jail::VEVENTQ_ALLOC],
            // Asked when the device is bound. Queues are read and written.
            Self::GetHwInfo | Self::PageRequest | Self::PageResponse | Self::Vevent => &[],
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A verb that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{verb}{}: {errno}: {detail}", object_suffix(.object))]
#[non_exhaustive]
pub struct HostError {
    /// The verb that was called.
    pub verb: Verb,
    /// Its object, if any.
    pub object: Option<ObjectId>,
    /// Linux's error number.
    pub errno: Errno,
    /// What was wrong, with the value.
    pub detail: Cow<'static, str>,
}

impl HostError {
    /// `verb` on `object` failed with `errno` because of `detail`.
    pub fn new(
        verb: Verb,
        object: impl Into<Option<ObjectId>>,
        errno: Errno,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { verb, object: object.into(), errno, detail: detail.into() }
    }
}

fn object_suffix(object: &Option<ObjectId>) -> String {
    object.map(|id| format!(" on object {id}")).unwrap_or_default()
}

/// The result of a verb; of anything else, if its error is given.
pub type Result<T, E = HostError> = std::result::Result<T, E>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_verb_object_errno_and_reason() {
        let error =
            HostError::new(Verb::Destroy, ObjectId(7), Errno::EBUSY, "2 devices are attached");
        assert_eq!(error.to_string(), "DESTROY on object 7: EBUSY: 2 devices are attached");
        let error = HostError::new(Verb::IoasAlloc, None, Errno::from_raw(99), "odd");
        assert_eq!(error.to_string(), "IOAS_ALLOC: errno 99: odd");
    }
}
