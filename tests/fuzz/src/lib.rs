// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a process can do to the emulated host, decoded from bytes.
//!
//! One execution is one process from start to end, on a machine of its own with two IOMMUs and three
//! devices. It has two iommufds and a little memory; it makes ioctls on the iommufds and on devices,
//! writes its memory (tables and structures), has devices do DMA and users in the host access memory, and
//! closes what it has open. What it makes of its bytes is in [`table`]: a new ioctl is covered by a line
//! there.
//!
//! Whatever it does, nothing panics or hangs, what every object stands on is there, and when all is
//! closed no object is left and no memory pinned or locked.
#![forbid(unsafe_code)]

mod access;
mod process;
mod table;
mod value;

use arbitrary::{Result, Unstructured};

use process::Process;
use table::{DEVICE_IOCTLS, IOCTLS};
use value::{value, Kind};

/// Steps of one execution.
const MAX_STEPS: usize = 64;

/// What a process does next.
#[derive(Debug, Clone, Copy)]
enum Step {
    Ioctl(usize),
    DeviceIoctl(usize),
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
    /// The steps in the order of their numbers: those that are not ioctls first, so that a new ioctl
    /// changes no meaning but those of the last numbers.
    fn of(number: u8) -> Self {
        const OTHERS: [Step; 12] = [
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
        ];
        let all = OTHERS.len() + DEVICE_IOCTLS.len() + IOCTLS.len();
        let number = usize::from(number) % all;
        if let Some(step) = OTHERS.get(number) {
            return *step;
        }
        let number = number - OTHERS.len();
        match number.checked_sub(DEVICE_IOCTLS.len()) {
            None => Step::DeviceIoctl(number),
            Some(number) => Step::Ioctl(number),
        }
    }
}

/// One execution: see the [module's documentation](self).
pub fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let header: u8 = input.arbitrary().unwrap_or_default();
    let mut process = Process::new(header & 1 != 0);
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
        Step::Look => process.look(),
    }
    Ok(())
}
