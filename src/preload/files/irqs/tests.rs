// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Interrupts as a program sets them up.

use super::*;

const TRIGGER_NONE: u32 = TRIGGER | DATA_NONE;
const TRIGGER_BOOL: u32 = TRIGGER | DATA_BOOL;
const TRIGGER_EVENTFD: u32 = TRIGGER | DATA_EVENTFD;

fn set(msi: &mut Irqs, words: &[u32]) -> Result<i64, Errno> {
    msi.set(&Process::own(), words.as_ptr() as u64)
}

/// An eventfd; and how often it was signalled since the last call.
fn eventfd() -> (Internal, u32) {
    let event = Internal::new(sys::eventfd().unwrap());
    let number = event.raw() as u32;
    (event, number)
}

fn signalled(event: &Internal) -> u64 {
    sys::read_number(event.raw()).unwrap_or(0)
}

#[test]
fn a_vector_writes_its_eventfd_while_it_is_on() {
    let (event, fd) = eventfd();
    let mut msi = Irqs::new(false);
    let off = [20, TRIGGER_NONE, MSI_INDEX, 0, 0];
    assert_eq!(set(&mut msi, &off), Err(Errno::EINVAL), "it is off already");
    assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, u32::MAX]), Ok(0));
    msi.send(1);
    assert_eq!(signalled(&event), 0, "on, without an eventfd");
    assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
    msi.send(1);
    msi.send(1);
    assert_eq!(signalled(&event), 2);
    assert_eq!(set(&mut msi, &off), Ok(0));
    msi.send(1);
    assert_eq!(signalled(&event), 0);
}

#[test]
fn what_the_program_triggers_itself() {
    let (event, fd) = eventfd();
    let mut msi = Irqs::new(false);
    let none = [20, TRIGGER_NONE, MSI_INDEX, 0, 1];
    let level = |level| [21, TRIGGER_BOOL, MSI_INDEX, 0, 1, level];
    assert_eq!(set(&mut msi, &none), Err(Errno::EINVAL), "it is off");
    assert_eq!(set(&mut msi, &level(1)), Err(Errno::EINVAL));
    assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
    assert_eq!((set(&mut msi, &none), signalled(&event)), (Ok(0), 1));
    assert_eq!((set(&mut msi, &level(1)), signalled(&event)), (Ok(0), 1));
    assert_eq!((set(&mut msi, &level(0x100)), signalled(&event)), (Ok(0), 0), "false");
    // Of no vector: nothing changes.
    assert_eq!(set(&mut msi, &[20, TRIGGER_EVENTFD, MSI_INDEX, 0, 0]), Ok(0));
    assert_eq!((set(&mut msi, &none), signalled(&event)), (Ok(0), 1));
}

#[test]
fn what_a_device_with_one_vector_does_not_have() {
    let mut msi = Irqs::new(false);
    for (words, errno) in [
        // No room for the eventfd, or for the head; a second vector; MSI-X; two kinds of data,
        // or none; an unknown flag; a mask.
        ([20, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
        ([16, TRIGGER_NONE, MSI_INDEX, 0, 0, 0], Errno::EINVAL),
        ([24, TRIGGER_EVENTFD, MSI_INDEX, 1, 1, 0], Errno::EINVAL),
        ([24, TRIGGER_EVENTFD, MSI_INDEX, 0, u32::MAX, 0], Errno::EINVAL),
        ([24, TRIGGER_EVENTFD, 2, 0, 1, 0], Errno::EINVAL),
        ([24, TRIGGER_EVENTFD, IRQS, 0, 1, 0], Errno::EINVAL),
        ([24, TRIGGER | DATA_NONE | DATA_BOOL, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
        ([24, TRIGGER, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
        ([24, TRIGGER_NONE | 1 << 6, MSI_INDEX, 0, 1, 0], Errno::EINVAL),
        ([24, 1 << 3 | DATA_EVENTFD, MSI_INDEX, 0, 1, 0], Errno::ENOTTY),
    ] {
        assert_eq!(set(&mut msi, &words), Err(errno), "{words:x?}");
    }
    let no_file = [24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 1 << 20];
    assert_eq!(set(&mut msi, &no_file), Err(Errno::from_raw(libc::EBADF)));
    assert!(matches!(msi.on, On::Nothing));
    assert_eq!(msi.set(&Process::own(), 0), Err(Errno::EFAULT));
}

#[test]
fn a_request_for_the_device_is_an_eventfd() {
    let (event, fd) = eventfd();
    let mut irqs = Irqs::new(false);
    let none = |count| [20, TRIGGER_NONE, REQUEST_INDEX, 0, count];
    assert_eq!(set(&mut irqs, &none(1)), Err(Errno::EINVAL), "there is none");
    assert_eq!(set(&mut irqs, &[24, TRIGGER_EVENTFD, REQUEST_INDEX, 0, 1, fd]), Ok(0));
    assert_eq!((set(&mut irqs, &none(1)), signalled(&event)), (Ok(0), 1));
    let level = |level| [21, TRIGGER_BOOL, REQUEST_INDEX, 0, 1, level];
    assert_eq!((set(&mut irqs, &level(0)), signalled(&event)), (Ok(0), 0));
    assert_eq!((set(&mut irqs, &level(1)), signalled(&event)), (Ok(0), 1));
    irqs.send(1);
    assert_eq!(signalled(&event), 0, "MSI is another one");
    assert_eq!(set(&mut irqs, &none(0)), Ok(0));
    assert_eq!((set(&mut irqs, &none(1)), signalled(&event)), (Err(Errno::EINVAL), 0));
}

#[test]
fn a_pin_is_sent_once_until_it_is_unmasked() {
    let ((event, fd), (end, end_fd)) = (eventfd(), eventfd());
    let mut irqs = Irqs::new(false);
    let of = |flags, count| [20, flags, INTX_INDEX, 0, count];
    let with = |flags, fd| [24, flags | DATA_EVENTFD, INTX_INDEX, 0, 1, fd];
    irqs.set_level(true);
    assert_eq!(set(&mut irqs, &of(UNMASK | DATA_NONE, 1)), Err(Errno::EINVAL), "it is off");
    assert_eq!(set(&mut irqs, &with(TRIGGER, fd)), Ok(0));
    assert_eq!(signalled(&event), 1, "it is asserted already");
    irqs.set_level(true);
    assert_eq!(signalled(&event), 0, "masked");
    assert_eq!(set(&mut irqs, &of(UNMASK | DATA_NONE, 1)), Ok(0));
    assert_eq!(signalled(&event), 1, "still asserted");
    irqs.set_level(false);
    assert_eq!(set(&mut irqs, &of(UNMASK | DATA_NONE, 1)), Ok(0));
    assert_eq!(signalled(&event), 0);
    assert_eq!(set(&mut irqs, &of(MASK | DATA_NONE, 1)), Ok(0));
    irqs.set_level(true);
    assert_eq!(signalled(&event), 0);

    assert_eq!(set(&mut irqs, &with(UNMASK, end_fd)), Ok(0));
    assert!(irqs.wake_event().is_some() && irqs.wake_event().is_none());
    irqs.woken();
    assert_eq!(signalled(&event), 0, "nobody wrote it");
    sys::write_number(end.raw(), 1).unwrap();
    irqs.woken();
    assert_eq!((signalled(&event), signalled(&end)), (1, 0));
    assert_eq!(set(&mut irqs, &with(UNMASK, end_fd)), Err(Errno::EBUSY));
    assert_eq!(set(&mut irqs, &with(UNMASK, u32::MAX)), Ok(0));
    assert_eq!(set(&mut irqs, &with(MASK, end_fd)), Err(Errno::ENOTTY));
    let msi = [24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd];
    assert_eq!(set(&mut irqs, &msi), Err(Errno::EINVAL), "one kind at a time");
    assert_eq!(set(&mut irqs, &of(TRIGGER_NONE, 0)), Ok(0));
    assert_eq!(set(&mut irqs, &msi), Ok(0));
    assert_eq!(set(&mut irqs, &with(TRIGGER, fd)), Err(Errno::EINVAL));
}

#[test]
fn indices() {
    let all = |express: bool| [0, 1, 2, 3, 4, 5].map(|index| Irqs::new(express).info(index));
    let (pin, one, invalid) = (Ok((7, 1)), Ok((9, 1)), Err(Errno::EINVAL));
    assert_eq!(all(false), [pin, one, Ok((9, 0)), invalid, one, invalid]);
    assert_eq!(all(true), [pin, one, Ok((1, edu::VECTORS)), one, one, invalid]);
}

#[test]
fn each_vector_of_msi_x_has_an_eventfd() {
    let ((first, first_fd), (second, second_fd)) = (eventfd(), eventfd());
    let mut irqs = Irqs::new(true);
    let with = |start, count, fds: [u32; 2]| {
        [28, TRIGGER_EVENTFD, MSIX_INDEX, start, count, fds[0], fds[1]]
    };
    let none = |start, count| [20, TRIGGER_NONE, MSIX_INDEX, start, count];
    let empty = Err(Errno::from_raw(libc::ERANGE));
    assert_eq!(set(&mut irqs, &[20, TRIGGER_EVENTFD, MSIX_INDEX, 0, 0]), empty);
    assert_eq!(set(&mut irqs, &with(0, 1, [first_fd, 0])), Ok(0));
    let events = || (signalled(&first), signalled(&second));
    irqs.send(0x101);
    assert_eq!(events(), (1, 0), "the second has none");
    // While it is enabled, and beyond those that it was enabled with.
    assert_eq!(set(&mut irqs, &with(2, 2, [u32::MAX, second_fd])), Ok(0));
    irqs.send(0xff00_0000);
    assert_eq!(events(), (0, 1));
    irqs.send(0x0001_0100);
    assert_eq!(events(), (0, 0));
    assert_eq!((set(&mut irqs, &none(0, edu::VECTORS)), events()), (Ok(0), (1, 1)));
    let bytes = u32::from_ne_bytes([0, 0, 0, 1]);
    let some = [24, TRIGGER_BOOL, MSIX_INDEX, 0, 4, bytes];
    assert_eq!((set(&mut irqs, &some), events()), (Ok(0), (0, 1)));
    let msi = [24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, first_fd];
    assert_eq!(set(&mut irqs, &msi), Err(Errno::EINVAL), "one kind at a time");
    assert_eq!(set(&mut irqs, &none(0, 5)), Err(Errno::EINVAL));
    assert_eq!(set(&mut irqs, &none(4, 0)), Err(Errno::EINVAL));

    // One that is invalid takes all of the call away, the others stay.
    assert_eq!(set(&mut irqs, &with(2, 2, [first_fd, 2])), Err(Errno::EINVAL));
    irqs.send(0xffff_ffff);
    assert_eq!(events(), (1, 0));
    assert_eq!(set(&mut irqs, &none(0, 0)), Ok(0));
    irqs.send(0xffff_ffff);
    assert_eq!((set(&mut irqs, &msi), events()), (Ok(0), (0, 0)));
    assert_eq!(set(&mut irqs, &with(0, 1, [first_fd, 0])), Err(Errno::EINVAL));
    irqs.send(0x0300_0000);
    assert_eq!(events(), (1, 0), "MSI has one vector");

    // Enabled with an invalid one, it is off.
    assert_eq!(set(&mut irqs, &[20, TRIGGER_NONE, MSI_INDEX, 0, 0]), Ok(0));
    assert_eq!(set(&mut irqs, &with(0, 2, [first_fd, 2])), Err(Errno::EINVAL));
    assert!(matches!(irqs.on, On::Nothing));
}

#[test]
fn errors_of_a_pci_express_device_have_an_eventfd() {
    let (event, fd) = eventfd();
    let none = |count| [20, TRIGGER_NONE, ERR_INDEX, 0, count];
    let with = |fd| [24, TRIGGER_EVENTFD, ERR_INDEX, 0, 1, fd];
    assert_eq!(set(&mut Irqs::new(false), &with(fd)), Err(Errno::EINVAL), "conventional");
    let mut irqs = Irqs::new(true);
    assert_eq!(set(&mut irqs, &with(fd)), Ok(0));
    assert_eq!((set(&mut irqs, &none(1)), signalled(&event)), (Ok(0), 1));
    irqs.send(0xffff_ffff);
    assert_eq!(signalled(&event), 0);
    for (words, errno) in [
        (with(-2i32 as u32), Errno::EINVAL),
        (with(2), Errno::EINVAL),
        (with(1 << 20), Errno::EBADF),
        ([24, TRIGGER_EVENTFD, ERR_INDEX, 0, 0, fd], Errno::EINVAL),
        ([24, TRIGGER_BOOL, ERR_INDEX, 0, 0, fd], Errno::EINVAL),
        ([24, MASK | DATA_NONE, ERR_INDEX, 0, 1, 0], Errno::ENOTTY),
    ] {
        assert_eq!(set(&mut irqs, &words), Err(errno), "{words:x?}");
    }
    assert_eq!((set(&mut irqs, &none(1)), signalled(&event)), (Ok(0), 1), "as it was");
    assert_eq!(set(&mut irqs, &with(u32::MAX)), Ok(0));
    assert_eq!(set(&mut irqs, &none(0)), Err(Errno::EINVAL), "there is none any more");
}

#[test]
fn a_descriptor_that_is_no_eventfd_leaves_the_vector_without_one() {
    let (event, fd) = eventfd();
    let mut msi = Irqs::new(false);
    assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, fd]), Ok(0));
    assert_eq!(set(&mut msi, &[24, TRIGGER_EVENTFD, MSI_INDEX, 0, 1, 2]), Err(Errno::EINVAL));
    msi.send(1);
    assert_eq!(signalled(&event), 0);
    assert!(matches!(msi.on, On::Messages(MSI_INDEX, _)), "MSI stays on");
}
