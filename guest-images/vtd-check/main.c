// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// vtd-check: drives a VT-d remapping unit and `edu` devices, and reports the results.
#include "check.h"
#include "hw/edu.h"
#include "hw/pci.h"
#include "hw/vtd.h"
#include "lib/cmdline.h"
#include "lib/console.h"
#include "lib/interrupts.h"
#include "lib/loader.h"

extern const struct check_group edu_checks;
extern const struct check_group registers_checks;
extern const struct check_group legacy_blocked_checks;
extern const struct check_group blocked_checks;
extern const struct check_group same_requester_checks;
extern const struct check_group first_stage_checks;
extern const struct check_group stale_first_stage_checks;
extern const struct check_group in_flight_checks;
extern const struct check_group pasid_checks;
extern const struct check_group ats_checks;
extern const struct check_group malformed_tables_checks;
extern const struct check_group interrupt_range_checks;
extern const struct check_group interrupt_remapping_checks;
extern const struct check_group fault_log_checks;
extern const struct check_group queue_checks;
extern const struct check_group legacy_second_stage_checks;
extern const struct check_group stale_legacy_by_register_checks;
extern const struct check_group stale_legacy_by_queue_checks;
extern const struct check_group second_stage_checks;
extern const struct check_group stale_second_stage_checks;
extern const struct check_group nested_checks;
extern const struct check_group stale_nested_checks;
extern const struct check_group page_requests_checks;
extern const struct check_group shared_checks;
extern const struct check_group last_checks;
extern const struct check_group two_units_checks;
extern const struct check_group forget_checks;
extern const struct check_group unmaps_checks;
extern const struct check_group loans_checks;
extern const struct check_group virtio_checks;

// A driver that keeps its device busy until the machine is ended from outside, or resets itself.
void virtio_never_done(bool reset);
// Causes something worth a log line, `times=` times.
void virtio_flood(u64 times);
// Does what the serial port is told.
void obey_orders(void);

static const struct check_group *const vtd_groups[] = {
    &registers_checks,
    &legacy_blocked_checks,
    &blocked_checks,
    &first_stage_checks,
    &stale_first_stage_checks,
    &in_flight_checks,
    &pasid_checks,
    &malformed_tables_checks,
    &interrupt_range_checks,
    &interrupt_remapping_checks,
    &fault_log_checks,
    &queue_checks,
    &legacy_second_stage_checks,
    &stale_legacy_by_register_checks,
    &stale_legacy_by_queue_checks,
    &second_stage_checks,
    &stale_second_stage_checks,
    &shared_checks,
};

// The result of `cmdline_number` for a missing word.
#define UNSAID (~0ull)

// `virtio=` on the command line: only virtio devices, without a remapping unit.
static void run_virtio(u64 what)
{
    enum { CHECKS = 1, NEVER_DONE = 2, FLOOD = 3, RESET = 4, ORDERS = 5 };

    if (what == CHECKS)
        check_run(&virtio_checks);
    else if (what == NEVER_DONE || what == RESET)
        virtio_never_done(what == RESET);
    else if (what == FLOOD)
        virtio_flood(cmdline_number("times", 1000));
    else if (what == ORDERS)
        obey_orders();
    machine_exit(check_summary() ? 0 : 1);
}

static void introduce(void)
{
    print("# vtd-check, started by %s; %s; %u edu\n", boot_protocol(),
          pci_has_ecam() ? "ECAM" : "no ECAM, PCI through ports", edu_count);
}

// Runs every group for one unit.
static void check_unit(void)
{
    print("# VT-d at 0x%lx: VER %02x CAP 0x%lx ECAP 0x%lx, %u fault records\n", vtd->base, vtd_read32(VTD_VER),
          vtd->cap, vtd->ecap, vtd->fault_record_count);
    for (unsigned n = 0; n < ARRAY_LEN(vtd_groups); n++)
        check_run(vtd_groups[n]);
    if (ecap_nested()) {
        check_run(&nested_checks);
        check_run(&stale_nested_checks);
    }
    if (ecap_device_tlb() && edu_has_ats(&edus[0]))
        check_run(&ats_checks);
    if (ecap_page_requests() && pci_extended_capability(edus[0].place, PCI_EXT_CAP_PRI))
        check_run(&page_requests_checks);
    if (edu_sharing(&edus[0]))
        check_run(&same_requester_checks);
    check_run(&last_checks);
}

// Runs every group of checks; with `vtd=0` on the command line, those that need no unit; with
// `forget=` or `unmaps=`, that one. With two units, a device is behind each.
static void run_checks(void)
{
    bool forget = cmdline_number("forget", UNSAID) != UNSAID;
    bool unmaps = cmdline_number("unmaps", 0) != 0;

    if (!forget && !unmaps)
        check_run(&edu_checks);
    if (!cmdline_number("vtd", 1)) {
        print("# vtd=0: no remapping unit, its checks are left out\n");
        return;
    }
    if (!vtd_init()) {
        print("no VT-d unit answers at 0x%lx\n", vtd->base);
        machine_exit(1);
    }
    if (forget) {
        for (u64 left = cmdline_number("times", 1); left; left--)
            check_run(&forget_checks);
        return;
    }
    if (unmaps) {
        check_run(cmdline_number("loans", 0) ? &loans_checks : &unmaps_checks);
        return;
    }
    if (vtd_count == 1) {
        check_unit();
        return;
    }
    (void)edu_reaches(0);
    for (unsigned unit = 0; unit < vtd_count; unit++) {
        vtd_use(unit);
        edu_use(unit, 1);
        check_unit();
    }
    edu_use(0, vtd_count);
    check_run(&two_units_checks);
}

void guest_main(u32 magic, u64 start_info)
{
    console_init();
    loader_init(magic, start_info);
    interrupts_init();
    pci_init();
    if (cmdline_number("virtio", 0))
        run_virtio(cmdline_number("virtio", 0));
    edu_init();
    if (edu_count == 0) {
        print("there is no edu device (1234:11e8)\n");
        machine_exit(1);
    }
    // `first=` on the command line: leaves out the devices before this one, counted from 0.
    edu_use((unsigned)cmdline_number("first", 0), EDU_MOST);
    introduce();
    run_checks();
    machine_exit(check_summary() ? 0 : 1);
}
