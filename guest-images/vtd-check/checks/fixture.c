// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "fixture.h"
#include "lib/cmdline.h"

// The devices' buffers contain this (followed by a counting pattern) from `devices_load` on; reads
// go to the second half.
#define PATTERN 0x5a5a000000000000ull
#define READ_OFFSET 2048u
#define WORD ((u32)sizeof(u64))

u64 *root;

static volatile u64 *mailbox;

u64 iova_base(void)
{
    return edu_reaches(0x2000000000) ? 0x2000000000 : 0x8000000;
}

static u64 pattern_of(const struct edu *edu)
{
    return PATTERN | edu->id;
}

// With translation disabled, gives each device's buffer its pattern.
static void devices_load(void)
{
    for (unsigned n = 0; n < edu_count; n++) {
        volatile u64 *page = page_new();

        if (edus[n].is_loaded)
            continue;
        edus[n].is_loaded = true;
        page[0] = pattern_of(&edus[n]);
        if (!edu_read_from(&edus[n], NO_PASID, gpa_of(page), 0, WORD))
            check_fail("device %02x does no DMA with translation off", edus[n].id);
    }
}

static void setup(u64 mode)
{
    static void *mark;

    if (!mark)
        mark = pages_mark();
    pages_release_to(mark);
    (void)edu_reaches(0);
    devices_load();
    mailbox = page_new();
    setup_unit(mode);
}

void setup_unit(u64 mode)
{
    faults_clear();
    root = page_new();
    if (!vtd_set_root(gpa_of(root) | mode))
        check_fail("GCMD.SRTP never showed in GSTS");
}

static void setup_queue(bool wide)
{
    if (!queue_start(wide))
        check_fail("GCMD.QIE never showed in GSTS");
}

void setup_scalable(void)
{
    SKIP_UNLESS(ecap_scalable(), "ECAP.SMTS is 0");
    setup(RTADDR_SCALABLE);
    setup_queue(true);
}

void setup_legacy_queue(void)
{
    SKIP_UNLESS(ecap_qi(), "ECAP.QI is 0");
    setup(RTADDR_LEGACY);
    setup_queue(false);
}

void setup_legacy_registers(void)
{
    setup(RTADDR_LEGACY);
}

void teardown(void)
{
    if (vtd_read32(VTD_GSTS) & GCMD_TE)
        (void)vtd_switch(GCMD_TE, false);
    queue_stop();
    fault_event_mask();
    faults_clear();
}

bool enable(void)
{
    bool by_queue = vtd_read32(VTD_GSTS) & GCMD_QIE;
    bool clean = by_queue ? queue_invalidate_all()
                          : vtd_invalidate_context(CONTEXT_GLOBAL, 0, 0) &&
                                vtd_invalidate_iotlb(IOTLB_GLOBAL, 0, 0, 0);

    if (!clean)
        check_fail("the global invalidations before enabling did not complete");
    else if (!vtd_switch(GCMD_TE, true))
        check_fail("GCMD.TE never showed in GSTS");
    return !check_is_over();
}

struct page_table space_new(void)
{
    struct page_table space = first_stage_new(4);

    if (!ecap_first_stage())
        check_skip("ECAP.FSTS is 0");
    map_leaf(&space, IOVA_MAILBOX, gpa_of(mailbox), LEVEL_4K, FS_READ_WRITE);
    return space;
}

bool legacy_second_stage(void)
{
    return cap_sagaw() != 0;
}

struct page_table second_stage_space_new(void)
{
    struct page_table space = second_stage_new(cap_sagaw() & BIT(2) ? 4 : 3);
    bool is_scalable = vtd_read64(VTD_RTADDR) & RTADDR_SCALABLE;

    if (is_scalable && !ecap_second_stage())
        check_skip("ECAP.SSTS is 0");
    if (!is_scalable && !legacy_second_stage())
        check_skip("CAP.SAGAW is 0");
    map_leaf(&space, IOVA_MAILBOX, gpa_of(mailbox), LEVEL_4K, SS_READ_WRITE);
    return space;
}

u64 *context_of(const struct edu *edu)
{
    return scalable_context(root, edu->id);
}

u64 *directory_of(const struct edu *edu)
{
    u64 *context = context_of(edu);

    if (!(context[0] & ENTRY_P))
        return scalable_context_set(context);
    return (u64 *)(uintptr_t)(context[0] & ~(PAGE_SIZE - 1));
}

u64 *attach_pasid(const struct edu *edu, u32 pasid, const struct page_table *space, u16 domain)
{
    u64 *entry = pasid_entry(directory_of(edu), pasid);

    if (space->table_rights == FS_READ_WRITE)
        pasid_entry_first_stage(entry, gpa_of(space->top), space->levels, domain);
    else
        pasid_entry_second_stage(entry, gpa_of(space->top), space->levels, domain);
    return entry;
}

u64 *attach(const struct edu *edu, const struct page_table *space, u16 domain)
{
    return attach_pasid(edu, 0, space, domain);
}

u64 *attach_legacy(const struct edu *edu, const struct page_table *space, u16 domain)
{
    u64 *entry = legacy_context(root, edu->id);

    legacy_context_set(entry, TT_UNTRANSLATED, gpa_of(space->top), space->levels, domain);
    return entry;
}

struct target target_new(void)
{
    return (struct target){page_new(), page_new()};
}

// Which of `target`'s pages a write reaches: 0 none, 1 old, 2 new, 3 both; the check fails if the
// device does not finish.
static unsigned landing(const struct edu *edu, u32 pasid, u64 iova, struct target target)
{
    u64 offset = (iova & (PAGE_SIZE - 1)) / WORD;

    target.old[offset] = target.new[offset] = 0;
    if (!edu_write_to(edu, pasid, iova, 0, WORD))
        check_fail("the device's DMA to 0x%lx does not end", iova);
    return (target.old[offset] == pattern_of(edu)) | (unsigned)(target.new[offset] == pattern_of(edu)) << 1;
}

static bool lands(const struct edu *edu, u32 pasid, u64 iova, struct target target, unsigned wanted,
                  const char *when)
{
    static const char *const places[] = {"neither page", "the old page", "the new page", "both pages"};
    unsigned place = landing(edu, pasid, iova, target);

    if (place != wanted) {
        struct fault fault = {0};
        bool faulted = fault_take(&fault);

        check_fail("%s a write to 0x%lx reached %s (%s 0x%02x)", when, iova, places[place],
                   faulted ? "fault" : "no fault", fault.reason);
    }
    return place == wanted;
}

bool lands_on_old(const struct edu *edu, u32 pasid, u64 iova, struct target target)
{
    return lands(edu, pasid, iova, target, 1, "before the change");
}

bool lands_on_new(const struct edu *edu, u32 pasid, u64 iova, struct target target)
{
    return lands(edu, pasid, iova, target, 2, "after the invalidation");
}

bool lands_on_stale(const struct edu *edu, u32 pasid, u64 iova, struct target target)
{
    bool may_be_fresh = cmdline_number("stale-required", 1) == 0;

    if (may_be_fresh && landing(edu, pasid, iova, target) == 2)
        return true;
    return lands(edu, pasid, iova, target, 1, "before the invalidation");
}

bool write_arrives(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page)
{
    return lands(edu, pasid, iova, (struct target){page_new(), page}, 2, "with translation set up");
}

bool read_arrives(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page)
{
    static u64 serial = 0x7ead000000000000ull;
    u64 found;

    page[(iova & (PAGE_SIZE - 1)) / WORD] = ++serial;
    if (!edu_read_from(edu, pasid, iova, READ_OFFSET, WORD)) {
        check_fail("the device's DMA from 0x%lx does not end", iova);
        return false;
    }
    found = device_holds(edu, pasid, IOVA_MAILBOX);
    if (found != serial)
        check_fail("a read from 0x%lx brought 0x%lx instead of 0x%lx", iova, found, serial);
    return found == serial;
}

u64 device_holds(const struct edu *edu, u32 pasid, u64 mailbox_iova)
{
    *mailbox = 0;
    if (!edu_write_to(edu, pasid, mailbox_iova, READ_OFFSET, WORD))
        check_fail("the device's DMA to the mailbox does not end");
    return *mailbox;
}

u64 mailbox_gpa(void)
{
    return gpa_of(mailbox);
}

bool devices_assigned(void)
{
    return cmdline_number("assigned", 0) == 1;
}

void require_hardware_walk(void)
{
    if (cmdline_number("mirrored", 0))
        check_skip("no hardware walks these tables: their mirror is walked");
}

// `assigned=2`: of two devices, the second one is.
static bool is_assigned(const struct edu *edu)
{
    return devices_assigned() || (cmdline_number("assigned", 0) == 2 && edu == SECOND);
}

// Takes the one record that the access by `edu` must have left.
static bool fault_matches(const struct edu *edu, u32 pasid, u64 iova, bool is_read, unsigned reason)
{
    struct fault fault;
    u64 page = iova & ~(PAGE_SIZE - 1);

    if (is_assigned(edu))
        return true;
    if (!fault_take(&fault))
        check_fail("the refused %s at 0x%lx left no fault record", is_read ? "read" : "write", iova);
    else if (fault.reason != reason)
        check_fail("fault reason 0x%02x instead of 0x%02x", fault.reason, reason);
    else if (fault.source != edu->id)
        check_fail("fault source %04x instead of %04x", fault.source, edu->id);
    else if (fault.address != page)
        check_fail("fault address 0x%lx instead of 0x%lx", fault.address, page);
    else if (fault.is_read != is_read)
        check_fail("fault type says %s", fault.is_read ? "read" : "write");
    else if (fault.has_pasid != (pasid != NO_PASID) && !cmdline_number("rid-pasid-in-record", 0))
        check_fail("fault record %s a PASID", fault.has_pasid ? "has" : "lacks");
    else if (pasid != NO_PASID && fault.pasid != pasid)
        check_fail("fault PASID 0x%x instead of 0x%x", fault.pasid, pasid);
    return !check_is_over();
}

// A write by `edu` that must not change `page` (null: not checked).
static bool write_moves_nothing(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page)
{
    volatile u64 *word = page ? &page[(iova & (PAGE_SIZE - 1)) / WORD] : NULL;

    if (word)
        *word = 0;
    if (!edu_write_to(edu, pasid, iova, 0, WORD))
        check_fail("the device's DMA to 0x%lx does not end", iova);
    else if (word && *word)
        check_fail("the write to 0x%lx went through", iova);
    return !check_is_over();
}

bool write_faults(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page, unsigned reason)
{
    return write_moves_nothing(edu, pasid, iova, page) && fault_matches(edu, pasid, iova, false, reason);
}

bool read_faults(const struct edu *edu, u32 pasid, u64 iova, unsigned reason)
{
    if (!edu_read_from(edu, pasid, iova, READ_OFFSET, WORD)) {
        check_fail("the device's DMA from 0x%lx does not end", iova);
        return false;
    }
    return fault_matches(edu, pasid, iova, true, reason);
}

bool write_vanishes(const struct edu *edu, u32 pasid, u64 iova, volatile u64 *page)
{
    struct fault fault;

    if (!write_moves_nothing(edu, pasid, iova, page))
        return false;
    if (fault_take(&fault))
        check_fail("fault 0x%02x was recorded", fault.reason);
    return !check_is_over();
}

void rights_hold(volatile u64 *read_only, volatile u64 *write_only, unsigned no_write, unsigned no_read)
{
    REQUIRE(write_faults(DEVICE, NO_PASID, IOVA, read_only, no_write));
    REQUIRE(read_arrives(DEVICE, NO_PASID, IOVA, read_only));
    REQUIRE(read_faults(DEVICE, NO_PASID, IOVA + PAGE_SIZE, no_read));
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA + PAGE_SIZE, write_only));
}

void first_stage_flags_follow(volatile u64 *page, volatile u64 *leaf, volatile u64 *top)
{
    EXPECT(edu_read_from(DEVICE, NO_PASID, IOVA, READ_OFFSET, WORD), "the read does not end");
    EXPECT((*leaf & (FS_A | FS_D)) == FS_A, "leaf 0x%lx after a read", *leaf);
    EXPECT(*top & FS_A, "top entry 0x%lx after a read", *top);
    REQUIRE(write_arrives(DEVICE, NO_PASID, IOVA, page));
    EXPECT((*leaf & (FS_A | FS_D)) == (FS_A | FS_D), "leaf 0x%lx after a write", *leaf);
}

bool mend(void)
{
    bool done = !cap_caching_mode() || queue_invalidate_all();

    if (!done)
        check_fail("the global invalidations did not complete: error %u", queue_error());
    return done;
}

bool invalidate(struct descriptor descriptor)
{
    if (!queue_run(descriptor))
        check_fail("invalidation 0x%lx 0x%lx did not complete (queue error %u)", descriptor.low,
                   descriptor.high, queue_error());
    return !check_is_over();
}
