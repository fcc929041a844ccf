/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * iort 1|2: writes the I/O remapping table (Arm DEN 0049, IORT) of QEMU's arm64 machine `virt`,
 * with its built-in SMMUv3, or with two `arm-smmuv3` devices, the second behind root bus 0x10. It
 * differs from QEMU's in two respects:
 *
 *  - The root complex has CANWBS: its DMA is coherent whatever memory attributes a stage-1 table
 *    requests. Linux offers stage 1 to user space only with CANWBS or S2FWB. It is true on an
 *    emulated machine, which has no caches.
 *  - All requester IDs are mapped to an SMMU, including those of buses that QEMU's table does not
 *    have.
 *
 * Linux uses the table in its initramfs (CONFIG_ACPI_TABLE_UPGRADE) because it has a higher
 * revision.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define PACKED __attribute__((packed))
#define NONSTRING __attribute__((nonstring)) /* no NUL at the end */

/* An SMMU's address, the first of its four consecutive interrupts, and the buses it translates. */
struct place {
	uint64_t base;
	uint32_t event_gsiv;
	uint32_t first_id, last_id;
};

/* QEMU's hw/arm/virt.c: the machine's built-in SMMU, and the first devices of its platform bus. */
static const struct place one[] = { { 0x09050000, 32 + 74, 0, 0xffff } };
static const struct place two[] = {
	{ 0x0c000000, 32 + 112, 0, 0x0fff },
	{ 0x0c020000, 32 + 116, 0x1000, 0xffff },
};
#define ITS_ID 0

struct sdt_header {
	char signature[4] NONSTRING;
	uint32_t length;
	uint8_t revision;
	uint8_t checksum;
	char oem_id[6] NONSTRING;
	char oem_table_id[8] NONSTRING;
	uint32_t oem_revision;
	char creator_id[4] NONSTRING;
	uint32_t creator_revision;
} PACKED;

struct node_header {
	uint8_t type;
	uint16_t length;
	uint8_t revision;
	uint32_t identifier;
	uint32_t mapping_count;
	uint32_t mapping_offset; /* from the start of the node */
} PACKED;

struct id_mapping {
	uint32_t input_base;
	uint32_t last; /* number of IDs, less one */
	uint32_t output_base;
	uint32_t output_reference; /* from the start of the table */
	uint32_t flags;
} PACKED;

struct its_group {
	struct node_header header;
	uint32_t count;
	uint32_t identifiers[1];
} PACKED;

struct smmuv3 {
	struct node_header header;
	uint64_t base_address;
	uint32_t flags;
	uint32_t reserved;
	uint64_t vatos_address;
	uint32_t model;
	uint32_t event_gsiv;
	uint32_t pri_gsiv;
	uint32_t gerror_gsiv;
	uint32_t sync_gsiv;
	uint32_t proximity_domain;
	uint32_t device_id_mapping_index;
} PACKED;

struct root_complex {
	struct node_header header;
	uint32_t cache_coherency;
	uint8_t allocation_hints;
	uint16_t reserved0;
	uint8_t memory_access_flags;
	uint32_t ats_attribute;
	uint32_t segment;
	uint8_t memory_address_limit; /* bits */
	uint8_t reserved1[3];
} PACKED;

struct iort {
	struct sdt_header header;
	uint32_t node_count;
	uint32_t node_offset;
	uint32_t reserved;
} PACKED;

enum { ITS_GROUP = 0, ROOT_COMPLEX = 2, SMMUV3 = 4 };

#define SMMU_COHACC_OVERRIDE 1
#define MEMORY_CPM 1
#define MEMORY_DACS 2
#define MEMORY_CANWBS 4

static uint8_t table[1024];
static uint32_t length;

/* Appends `size` bytes; returns their offset in the table. */
static uint32_t append(const void *bytes, size_t size)
{
	uint32_t offset = length;

	memcpy(table + offset, bytes, size);
	length += size;
	return offset;
}

static uint32_t append_its(void)
{
	const struct its_group its = {
		.header = { .type = ITS_GROUP, .length = sizeof(its), .revision = 1, .identifier = 0 },
		.count = 1,
		.identifiers = { ITS_ID },
	};

	return append(&its, sizeof(its));
}

static uint32_t append_smmu(const struct place *place, uint32_t identifier, uint32_t its)
{
	const struct id_mapping all = { .last = 0xffff, .output_reference = its };
	const struct smmuv3 smmu = {
		.header = {
			.type = SMMUV3,
			.length = sizeof(smmu) + sizeof(all),
			.revision = 4,
			.identifier = identifier,
			.mapping_count = 1,
			.mapping_offset = sizeof(smmu),
		},
		.base_address = place->base,
		.flags = SMMU_COHACC_OVERRIDE,
		.event_gsiv = place->event_gsiv,
		.pri_gsiv = place->event_gsiv + 1,
		.gerror_gsiv = place->event_gsiv + 3,
		.sync_gsiv = place->event_gsiv + 2,
	};
	uint32_t offset = append(&smmu, sizeof(smmu));

	append(&all, sizeof(all));
	return offset;
}

static void append_root_complex(const struct place *places, const uint32_t *smmus, uint32_t count)
{
	const struct root_complex root_complex = {
		.header = {
			.type = ROOT_COMPLEX,
			.length = sizeof(root_complex) + count * sizeof(struct id_mapping),
			.revision = 3,
			.identifier = 1 + count,
			.mapping_count = count,
			.mapping_offset = sizeof(root_complex),
		},
		.cache_coherency = 1,
		.memory_access_flags = MEMORY_CPM | MEMORY_DACS | MEMORY_CANWBS,
		.memory_address_limit = 64,
	};

	append(&root_complex, sizeof(root_complex));
	for (uint32_t n = 0; n < count; n++) {
		const struct id_mapping mapping = {
			.input_base = places[n].first_id,
			.last = places[n].last_id - places[n].first_id,
			.output_base = places[n].first_id,
			.output_reference = smmus[n],
		};

		append(&mapping, sizeof(mapping));
	}
}

int main(int argc, char **argv)
{
	const uint32_t count = argc == 2 && !strcmp(argv[1], "2") ? 2 : 1;
	const struct place *places = count == 2 ? two : one;
	struct iort iort = {
		.header = {
			.signature = "IORT",
			.revision = 3,
			/* QEMU's, except its revision of 1: Linux replaces a table by one with a higher revision. */
			.oem_id = "BOCHS ",
			.oem_table_id = "BXPC    ",
			.oem_revision = 2,
			.creator_id = "BXPC",
			.creator_revision = 1,
		},
		.node_count = 2 + count,
		.node_offset = sizeof(iort),
	};
	uint32_t its, smmus[2];
	uint8_t sum = 0;

	append(&iort, sizeof(iort));
	its = append_its();
	for (uint32_t n = 0; n < count; n++)
		smmus[n] = append_smmu(&places[n], 1 + n, its);
	append_root_complex(places, smmus, count);

	iort.header.length = length;
	memcpy(table, &iort, sizeof(iort));
	for (uint32_t n = 0; n < length; n++)
		sum += table[n];
	iort.header.checksum = -sum;
	memcpy(table, &iort, sizeof(iort));
	return fwrite(table, length, 1, stdout) != 1 || fflush(stdout) != 0;
}
