// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// smmu-check: drives an SMMUv3 and an `edu` device behind it, and reports the results. With
// `doorbell` on the command line it only checks where the MSIs of an assigned edu arrive; with
// `stalls` and `page-requests`, also these, of an edu that can be stalled, or that has PRI.
#include "check.h"
#include "hw/edu.h"
#include "hw/smmu.h"
#include "lib/console.h"
#include "lib/devicetree.h"

extern const struct check_group streams_checks;
extern const struct check_group stage_1_checks;
extern const struct check_group messages_checks;
extern const struct check_group stale_checks;
extern const struct check_group queue_checks;
extern const struct check_group stalls_checks;
extern const struct check_group page_requests_checks;
extern const struct check_group doorbell_checks;

static const struct check_group *const groups[] = {&streams_checks, &stage_1_checks, &messages_checks,
                                                 &stale_checks, &queue_checks};

// Called from boot/.
void guest_main(u64 device_tree);
__attribute__((noreturn)) void exception(u64 syndrome, u64 address, u64 fault_address);

void exception(u64 syndrome, u64 address, u64 fault_address)
{
    print("exception at 0x%lx: ESR 0x%lx, FAR 0x%lx\n", address, syndrome, fault_address);
    machine_exit(1);
}

void guest_main(u64 device_tree)
{
    if (!devicetree_init(device_tree))
        for (;;)
            asm volatile("wfi");
    console_init();
    pci_init();
    if (!pci_has_ecam() || !smmu_init()) {
        print("the device tree has no PCI host bridge with ECAM, or no SMMUv3\n");
        machine_exit(1);
    }
    edu_init();
    if (edu_count == 0) {
        print("there is no edu device (1234:11e8) on bus 0\n");
        machine_exit(1);
    }
    print("# smmu-check: edu is %02x:%02x.%u; IDR0 0x%08x IDR1 0x%08x IDR5 0x%08x\n", edus[0].id >> 8,
          edus[0].id >> 3 & 31, edus[0].id & 7, smmu_read(SMMU_IDR0), smmu_read(SMMU_IDR1), smmu_read(SMMU_IDR5));
    if (on_command_line("doorbell"))
        check_run(&doorbell_checks);
    else
        for (unsigned n = 0; n < ARRAY_LEN(groups); n++)
            check_run(groups[n]);
    // Only a device of its own kind stalls, behind a unit that lets it.
    if (on_command_line("stalls"))
        check_run(&stalls_checks);
    if (on_command_line("page-requests"))
        check_run(&page_requests_checks);
    machine_exit(check_summary() ? 0 : 1);
}
