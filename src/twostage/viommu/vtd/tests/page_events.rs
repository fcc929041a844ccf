// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Events that are raised while the guest has the register page as memory: they are what it has
//! made of them there by then.

use super::page::Paged;
use super::page_requests::{ask, serving};
use super::*;

const MASKED: u32 = 1 << 31;
const PENDING: u32 = 1 << 30;

/// An event of a unit: its control register, which is followed by those of its message, and what
/// raises it without a look at the page.
type Event = (Paged, u64, fn(&Paged));

fn dma_fault() -> Event {
    let raise = |paged: &Paged| paged.guest.iommu.dma_fault(&fault(Requester::rid(RID)));
    (Paged::running(), regs::FECTL, raise)
}

fn queue_error() -> Event {
    // The tail of a vCPU that had exited before.
    let raise = |paged: &Paged| paged.guest.submit_words(&[[0xf, 0, 0, 0]]);
    (Paged::running(), regs::FECTL, raise)
}

fn page_request() -> Event {
    let raise = |paged: &Paged| assert_eq!(ask(&paged.guest, 1, 1), None);
    (Paged::of(serving()), regs::PECTL, raise)
}

fn end_of_invalidations() -> Event {
    let raise = |paged: &Paged| {
        let (status, fence, drain_page_requests) = (None, false, false);
        let wait = Descriptor::Wait { status, interrupt: true, fence, drain_page_requests };
        paged.guest.submit(&[wait]);
    };
    (Paged::running(), regs::IECTL, raise)
}

const EVENTS: [fn() -> Event; 4] = [dma_fault, queue_error, page_request, end_of_invalidations];

#[test]
fn an_event_that_was_masked_in_memory_is_pending() {
    for event in EVENTS {
        let (paged, control, raise) = event();
        paged.write(control, 0);
        assert!(paged.lend());
        paged.write(control, MASKED);
        raise(&paged);
        assert_eq!((paged.guest.messages(), paged.slot.is_there()), (vec![], false));
        assert_eq!(paged.read(control), MASKED | PENDING, "{control:#x}");
        assert_eq!(paged.differences(), []);
        // Once, when the guest allows it.
        paged.write(control, 0);
        assert_eq!(paged.guest.messages().len(), 1, "{control:#x}");
        assert_eq!(paged.read(control), 0, "{control:#x}");
    }
}

#[test]
fn an_event_that_was_unmasked_in_memory_is_sent_where_the_guest_wants_it() {
    for event in EVENTS {
        let (paged, control, raise) = event();
        assert!(paged.lend());
        paged.write(control + 8, 0xfee0_1003);
        paged.write(control + 12, 1);
        paged.write(control + 4, 0x77);
        paged.write(control, 0);
        raise(&paged);
        assert_eq!(paged.guest.messages(), [(0x1_fee0_1000, 0x77)], "{control:#x}");
        // What was written is taken once: nothing more comes of it.
        assert_eq!((paged.read(control), paged.read(control + 4)), (0, 0x77));
        assert_eq!((paged.guest.messages(), paged.differences()), (vec![], vec![]));
    }
}

#[test]
fn a_page_request_goes_where_the_guest_has_moved_the_head() {
    let paged = Paged::of(serving());
    // The queue of one page is full but for one.
    for group in 0..0x1000 / 32 - 1 {
        assert_eq!(ask(&paged.guest, group, 1), None);
    }
    paged.write(regs::PRS, 1);
    assert!(paged.lend());
    let tail = paged.page.load(regs::PQT);
    paged.write(regs::PQH, tail);
    assert_eq!(ask(&paged.guest, 0x100, 2), None);
    assert_eq!((paged.read(regs::PQH), paged.read(regs::PQT)), (tail, 0));
    assert_eq!((paged.read(regs::PRS), paged.differences()), (1, vec![]));
}
