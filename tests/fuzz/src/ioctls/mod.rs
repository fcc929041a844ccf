// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a process can do to the emulated host, decoded from bytes.
//!
//! One execution is one process from start to end, on its own machine with two IOMMUs and three
//! devices. It has two iommufds and a little memory; it makes ioctls on the iommufds and on
//! devices, writes its memory (tables and structures), makes devices do DMA and users in the host
//! access memory, and closes what it has open. [`table`] defines how bytes are interpreted: a new
//! ioctl is covered by a line there.
//!
//! Rarely it is a VMM, and [`guest`] has its guest do what drivers of IOMMUs do.
//!
//! Whatever it does, nothing panics or hangs, every object's dependencies exist, and when
//! everything is closed no object is left and no memory pinned or locked.

mod access;
mod graph;
mod guest;
mod process;
pub(crate) mod table;
pub(crate) mod value;

use arbitrary::{Result, Unstructured};
use twostage::iommufd::{ObjectId, PageRequest, PageRequestFlags, PageRequestPermissions};

use crate::input::Input;
use process::Process;
use table::{CONTAINER_IOCTLS, CONTAINER_NUMBERS, DEVICE_IOCTLS, IOCTLS};
use value::{value, Kind};

/// Maximum number of steps of one execution.
const MAX_STEPS: usize = 64;

/// What a process does next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Ioctl(usize),
    DeviceIoctl(usize),
    ContainerIoctl(usize),
    ContainerNumber,
    AddGroup,
    EventFile,
    Raise,
    Mmap,
    OpenDevice,
    CloseDevice,
    Write,
    Dma,
    NewAccess,
    Access,
    DropAccess,
    CloseIommufd,
    Look,
}

impl Step {
    /// The steps by number: those that are not ioctls first, so that a new ioctl only changes the
    /// meaning of the last numbers.
    fn of(number: u8) -> Self {
        const OTHERS: [Step; 17] = [
            Step::Dma,
            Step::Dma,
            Step::Write,
            Step::Write,
            Step::OpenDevice,
            Step::CloseDevice,
            Step::CloseIommufd,
            Step::Look,
            Step::NewAccess,
            Step::Access,
            Step::Access,
            Step::DropAccess,
            Step::ContainerNumber,
            Step::AddGroup,
            Step::EventFile,
            Step::Raise,
            Step::Mmap,
        ];
        let device = (0..DEVICE_IOCTLS.len()).map(Step::DeviceIoctl);
        let container = (0..CONTAINER_IOCTLS.len()).map(Step::ContainerIoctl);
        let iommufd = (0..IOCTLS.len()).map(Step::Ioctl);
        let mut all = OTHERS.into_iter().chain(device).chain(container).chain(iommufd).cycle();
        all.nth(number.into()).unwrap_or(Step::Look)
    }
}

/// One execution: see the [module's documentation](self).
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let header: u8 = input.arbitrary().unwrap_or_default();
    if header >= 0xf0 {
        return guest::run(&mut Input::new(&bytes[1..]));
    }
    let mut process = Process::new(header & 1 != 0, header & 4 != 0);
    for _ in 0..MAX_STEPS {
        // Too few bytes are zeroes; an empty input is the end.
        if input.is_empty() || step(&mut process, &mut input).is_err() {
            break;
        }
    }
    process.end(header & 2 != 0);
}

fn step(process: &mut Process, input: &mut Unstructured) -> Result<()> {
    match Step::of(input.arbitrary()?) {
        Step::Ioctl(number) => {
            let fd = value(input, Kind::Fd)?;
            let mut argument = IOCTLS[number].argument(input)?;
            process.ioctl(fd as usize, IOCTLS[number].request, &mut argument);
        }
        Step::DeviceIoctl(number) => {
            let device = input.arbitrary()?;
            let mut argument = DEVICE_IOCTLS[number].argument(input)?;
            process.device_ioctl(device, DEVICE_IOCTLS[number].request, &mut argument);
        }
        Step::ContainerIoctl(number) => {
            let (fd, at) = (value(input, Kind::Fd)?, value(input, Kind::Pointer)?);
            let argument = CONTAINER_IOCTLS[number].argument(input)?;
            process.container_ioctl(fd as usize, CONTAINER_IOCTLS[number].request, at, argument);
        }
        Step::ContainerNumber => {
            let fd = value(input, Kind::Fd)?;
            let which = usize::from(input.arbitrary::<u8>()?) % CONTAINER_NUMBERS.len();
            let (request, last) = CONTAINER_NUMBERS[which];
            process.container_number(fd as usize, request, value(input, Kind::Choice(last))?);
        }
        Step::AddGroup => process.add_group(input.arbitrary()?),
        Step::EventFile => {
            let (number, how) = (input.arbitrary()?, input.arbitrary()?);
            let (address, count) = (value(input, Kind::Pointer)?, value(input, Kind::Count)?);
            process.event_file(number, how, address, count as usize);
        }
        Step::Raise => {
            let (fd, object) = (value(input, Kind::Fd)?, value(input, Kind::Id)?);
            let kind = input.arbitrary::<u8>()?.into();
            let request = page_request(input)?;
            process.raise(fd as usize, ObjectId(object as u32), kind, request);
        }
        Step::Mmap => {
            let (fd, offset) = (value(input, Kind::Fd)?, value(input, Kind::Iova)?);
            let length = value(input, Kind::Length)?;
            process.mmap(fd as usize, offset, length, input.arbitrary()?);
        }
        Step::OpenDevice => process.open_device(input.arbitrary()?),
        Step::CloseDevice => process.close_device(input.arbitrary()?),
        Step::Write => {
            let (address, words) = (value(input, Kind::Pointer)?, input.arbitrary::<u8>()? % 4 + 1);
            for word in 0..u64::from(words) {
                process.write(address.wrapping_add(word * 8), value(input, Kind::Word)?);
            }
        }
        Step::Dma => {
            let (device, how) = (input.arbitrary()?, input.arbitrary()?);
            let (pasid, iova) = (value(input, Kind::Pasid)?, value(input, Kind::Iova)?);
            process.dma(
                device,
                how,
                pasid as u32,
                iova.wrapping_add(input.arbitrary::<u8>()?.into()),
            );
        }
        Step::NewAccess => process.new_access(input.arbitrary()?),
        Step::Access => {
            let (user, how) = (input.arbitrary()?, input.arbitrary()?);
            let (ioas, iova) = (value(input, Kind::Id)?, value(input, Kind::Iova)?);
            process.access(user, how, ioas as u32, iova, value(input, Kind::Length)?);
        }
        Step::DropAccess => process.drop_access(input.arbitrary()?),
        Step::CloseIommufd => process.close_iommufd(input.arbitrary()?),
        Step::Look => process.look_at_text(),
    }
    Ok(())
}

fn page_request(input: &mut Unstructured) -> Result<PageRequest> {
    Ok(PageRequest {
        flags: PageRequestFlags::from_bits(value(input, Kind::Flags(3))? as u32),
        pasid: value(input, Kind::Pasid)? as u32,
        group: value(input, Kind::Count)? as u32,
        permissions: PageRequestPermissions::from_bits(value(input, Kind::Flags(15))? as u32),
        address: value(input, Kind::Iova)?,
    })
}
