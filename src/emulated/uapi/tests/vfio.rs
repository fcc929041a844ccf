// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The ioctls of a VFIO device.

use std::sync::Arc;

use super::{flat, u32_at, Field, Process as Program, D, Q};
use crate::host::objects::tests::fake::PASID;
use crate::uapi::{DeviceFile, Process, UserFault, UserSpace};
use crate::EmulatedHost;
use twostage::iommufd::{Errno, HostIommu, ObjectId, UserMemory};

const BIND: u32 = 0x3b76;
const ATTACH: u32 = 0x3b77;
const DETACH: u32 = 0x3b78;
/// Address of a token in the process.
const TOKEN: u64 = 0x1000;

/// A device, opened by a process whose descriptor 3 is an iommufd and 4 is not.
struct Opened {
    file: DeviceFile,
    descriptors: Descriptors,
}

#[derive(Debug, Clone)]
struct Descriptors(Arc<EmulatedHost>);

impl UserSpace for Descriptors {
    fn share(&self) -> Arc<dyn UserSpace> {
        Arc::new(self.clone())
    }

    /// A token can be read.
    fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), UserFault> {
        if address == TOKEN {
            return Ok(());
        }
        Err(UserFault { address, length: bytes.len() as u64 })
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), UserFault> {
        Err(UserFault { address, length: bytes.len() as u64 })
    }

    fn memory(&self, address: u64, length: u64, _: bool) -> Result<UserMemory, UserFault> {
        Err(UserFault { address, length })
    }
}

impl Process for Descriptors {
    fn iommufd(&self, descriptor: i32) -> Result<Arc<EmulatedHost>, Errno> {
        match descriptor {
            3 => Ok(self.0.clone()),
            4 => Err(Errno::EBADFD),
            _ => Err(Errno::EBADF),
        }
    }
}

fn call(opened: &Opened, request: u32, fields: &[Field]) -> Result<Vec<u8>, Errno> {
    let mut bytes = flat(fields);
    opened.file.ioctl(request, &mut bytes, &opened.descriptors).map(|()| bytes)
}

fn open(process: &Program) -> Opened {
    open_as(&process.bench.host, "a")
}

fn open_as(host: &Arc<EmulatedHost>, name: &str) -> Opened {
    let file = host.machine().open_device(name).unwrap();
    Opened { file, descriptors: Descriptors(host.clone()) }
}

#[test]
fn binding_is_the_first_thing_a_device_takes() {
    let process = Program::new();
    assert_eq!(process.bench.host.machine().open_device("x").unwrap_err(), Errno::ENODEV);
    let file = open(&process);
    for request in [ATTACH, DETACH, 0x3b64] {
        assert_eq!(call(&file, request, &[D(16), D(0), D(1), D(0)]), Err(Errno::EINVAL));
    }
    let bind = |file: &Opened, fields: &[Field]| call(file, BIND, fields);
    assert_eq!(bind(&file, &[]), Err(Errno::EFAULT));
    assert_eq!(bind(&file, &[D(15), D(9), D(!0), D(0)]), Err(Errno::EINVAL));
    assert_eq!(bind(&file, &[D(17), D(0), D(3), D(0)]), Err(Errno::EFAULT));
    assert_eq!(bind(&file, &[D(32), D(0), D(3), D(0), Q(0), Q(1)]), Err(Errno::E2BIG));
    assert_eq!(bind(&file, &[D(16), D(2), D(3), D(0)]), Err(Errno::EINVAL), "unknown flags");
    assert_eq!(bind(&file, &[D(16), D(1), D(4), D(0)]), Err(Errno::EFAULT), "a token at 0");
    assert_eq!(bind(&file, &[D(24), D(1), D(4), D(0), Q(9)]), Err(Errno::EFAULT));
    assert_eq!(bind(&file, &[D(24), D(1), D(4), D(0), Q(TOKEN)]), Err(Errno::EINVAL), "a token");
    assert_eq!(bind(&file, &[D(16), D(0), D(!0), D(0)]), Err(Errno::EINVAL), "no iommufd");
    assert_eq!(bind(&file, &[D(16), D(0), D(4), D(0)]), Err(Errno::EBADFD));
    assert_eq!(bind(&file, &[D(16), D(0), D(5), D(0)]), Err(Errno::EBADF));
    let answer = bind(&file, &[D(32), D(0), D(3), D(0), Q(0), Q(0)]).unwrap();
    assert_eq!(u32_at(&answer, 12), 1, "out_devid");
    assert_eq!(bind(&file, &[D(16), D(0), D(3), D(0)]), Err(Errno::EINVAL), "bound");
    let other = open(&process);
    assert_eq!(bind(&other, &[D(16), D(0), D(3), D(0)]), Err(Errno::EINVAL), "elsewhere");
    assert_eq!(call(&file, 0x3b64, &[D(4)]), Err(Errno::ENOTTY));
    drop(file);
    bind(&other, &[D(16), D(0), D(3), D(0)]).expect("closing unbinds");
}

#[test]
fn attach_gives_the_hwpt_that_serves() {
    let process = Program::new();
    let file = open(&process);
    call(&file, BIND, &[D(16), D(0), D(3), D(0)]).unwrap();
    let ioas = process.bench.ioas();
    let attach = |fields: &[Field]| call(&file, ATTACH, fields);
    assert_eq!(attach(&[D(12), D(0)]), Err(Errno::EFAULT));
    assert_eq!(attach(&[D(11), D(2), D(ioas.0)]), Err(Errno::EINVAL));
    assert_eq!(attach(&[D(12), D(2), D(ioas.0)]), Err(Errno::EINVAL));
    assert_eq!(attach(&[D(12), D(1), D(ioas.0)]), Err(Errno::EINVAL), "no room for a PASID");
    assert_eq!(attach(&[D(16), D(1), D(ioas.0)]), Err(Errno::EFAULT));
    assert_eq!(attach(&[D(12), D(0), D(99)]), Err(Errno::ENOENT));
    let answer = attach(&[D(5000), D(0), D(ioas.0)]).expect("bytes beyond are not looked at");
    let automatic = u32_at(&answer, 8);
    assert_ne!(automatic, ioas.0);
    let dev = ObjectId(1);
    let pasid = process.bench.paging(dev, ioas, PASID).unwrap();
    attach(&[D(12), D(0), D(pasid.0)]).unwrap();
    attach(&[D(16), D(1), D(pasid.0), D(7)]).unwrap();
    assert!(process.bench.host.graph().to_string().contains("PASID 0x7"));

    let detach = |fields: &[Field]| call(&file, DETACH, fields);
    assert_eq!(detach(&[D(8)]), Err(Errno::EFAULT));
    assert_eq!(detach(&[D(7), D(2)]), Err(Errno::EINVAL));
    assert_eq!(detach(&[D(8), D(2)]), Err(Errno::EINVAL));
    assert_eq!(detach(&[D(8), D(1), D(7)]), Err(Errno::EINVAL));
    detach(&[D(12), D(1), D(7)]).unwrap();
    detach(&[D(12), D(1), D(8)]).expect("even when it was not attached");
    detach(&[D(8), D(0)]).unwrap();
    process.call(iommufd_bindings::IOMMUFD_CMD_DESTROY, &[D(pasid.0)]).unwrap();
}

#[test]
fn vfio_goes_by_what_it_attached_itself() {
    let process = Program::new();
    let file = open(&process);
    call(&file, BIND, &[D(16), D(0), D(3), D(0)]).unwrap();
    let (dev, ioas) = (ObjectId(1), process.bench.ioas());
    let [first, second] = [0; 2].map(|_| process.bench.paging(dev, ioas, PASID).unwrap());
    let attach = |hwpt: ObjectId, pasid| {
        call(&file, ATTACH, &[D(16), D(1), D(hwpt.0), D(pasid)]).map(|_| ())
    };
    assert_eq!(attach(first, 1 << 31), Err(Errno::ENOSPC));
    assert_eq!(attach(first, 1 << 16), Err(Errno::EINVAL), "not one of the device's");
    attach(first, 7).unwrap();
    attach(second, 7).expect("a replacement");
    // PASID 0 is the device itself for iommufd, but not for VFIO.
    attach(first, 0).unwrap();
    let whole = [D(12), D(0), D(second.0)];
    assert_eq!(call(&file, ATTACH, &whole), Err(Errno::EBUSY));
    call(&file, DETACH, &[D(8), D(0)]).expect("nothing that VFIO knows of");
    let destroy = |hwpt| process.bench.host.destroy(hwpt).map_err(|error| error.errno);
    assert_eq!(destroy(first), Err(Errno::EBUSY));
    call(&file, DETACH, &[D(12), D(1), D(0)]).unwrap();
    destroy(first).unwrap();
    call(&file, ATTACH, &whole).unwrap();
}

#[test]
fn closing_a_device_of_a_closed_host_is_fine() {
    let process = Program::new();
    let file = open(&process);
    call(&file, BIND, &[D(16), D(0), D(3), D(0)]).unwrap();
    process.bench.host.close();
    drop(file);
    assert_eq!(process.bench.host.live_objects(), 0);
}

#[test]
fn a_device_is_bound_to_one_of_several_iommufds_and_keeps_it_open() {
    let process = Program::new();
    let other = process.bench.host.machine().open();
    let (first, second) = (open(&process), open_as(&other, "a"));
    call(&first, BIND, &[D(16), D(0), D(3), D(0)]).unwrap();
    assert_eq!(call(&second, BIND, &[D(16), D(0), D(3), D(0)]), Err(Errno::EINVAL));
    drop(first);
    call(&second, BIND, &[D(16), D(0), D(3), D(0)]).unwrap();
    let ioas = other.ioas_alloc().unwrap();
    let Opened { file, descriptors } = second;
    drop((other, descriptors));
    let mut bytes = flat(&[D(12), D(0), D(ioas.0)]);
    file.ioctl(ATTACH, &mut bytes, &process.space).expect("the device keeps its iommufd open");
    drop(file);
    process.bench.bind("a");
}

#[test]
fn an_iommufd_of_another_machine_is_none() {
    let process = Program::new();
    let opened = Opened {
        file: process.bench.host.machine().open_device("a").unwrap(),
        descriptors: Descriptors(EmulatedHost::new()),
    };
    let bind = [D(16), D(0), D(3), D(0)];
    assert_eq!(call(&opened, BIND, &bind), Err(Errno::ENODEV));
}
