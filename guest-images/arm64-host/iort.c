/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * Writes the I/O remapping table (Arm DEN 0049, IORT) of QEMU's arm64 machine `virt` with an SMMUv3, as QEMU
 * makes it but for two things:
 *
 *  - the root complex says CANWBS: its DMA stays coherent whatever memory attributes a stage-1 table asks for.
 *    Linux hands stage 1 to user space only where that is so, or where the SMMU has S2FWB. It holds on an
 *    emulated machine, which has no caches.
 *  - all requester IDs lead to the SMMU, also those of buses that QEMU's table does not have.
 *
 * Linux takes the table from its initramfs (CONFIG_ACPI_TABLE_UPGRADE) because it is a later revision of the
 * same table.
 */
#include <stdint.h>
#include <stdio.h>

#define PACKED __attribute__((packed))
#define NONSTRING __attribute__((nonstring)) /* no NUL at the end */

/* QEMU's hw/arm/virt.c: where the SMMU is, its four interrupts in a row, the ITS. */
#define SMMU_BASE 0x09050000
#define SMMU_EVENT_GSIV (32 + 74)
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
	struct id_mapping mapping[1];
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
	struct id_mapping mapping[1];
} PACKED;

struct iort {
	struct sdt_header header;
	uint32_t node_count;
	uint32_t node_offset;
	uint32_t reserved;
	struct its_group its;
	struct smmuv3 smmu;
	struct root_complex root_complex;
} PACKED;

enum { ITS_GROUP = 0, ROOT_COMPLEX = 2, SMMUV3 = 4 };

#define SMMU_COHACC_OVERRIDE 1
#define MEMORY_CPM 1
#define MEMORY_DACS 2
#define MEMORY_CANWBS 4

#define OFFSET_OF(member) __builtin_offsetof(struct iort, member)

static struct iort iort = {
	.header = {
		.signature = "IORT",
		.length = sizeof(iort),
		.revision = 3,
		/* QEMU's, but for its revision of 1: Linux replaces a table by a later one. */
		.oem_id = "BOCHS ",
		.oem_table_id = "BXPC    ",
		.oem_revision = 2,
		.creator_id = "BXPC",
		.creator_revision = 1,
	},
	.node_count = 3,
	.node_offset = OFFSET_OF(its),
	.its = {
		.header = { .type = ITS_GROUP, .length = sizeof(iort.its), .revision = 1, .identifier = 0 },
		.count = 1,
		.identifiers = { ITS_ID },
	},
	.smmu = {
		.header = {
			.type = SMMUV3,
			.length = sizeof(iort.smmu),
			.revision = 4,
			.identifier = 1,
			.mapping_count = 1,
			.mapping_offset = __builtin_offsetof(struct smmuv3, mapping),
		},
		.base_address = SMMU_BASE,
		.flags = SMMU_COHACC_OVERRIDE,
		.event_gsiv = SMMU_EVENT_GSIV,
		.pri_gsiv = SMMU_EVENT_GSIV + 1,
		.gerror_gsiv = SMMU_EVENT_GSIV + 3,
		.sync_gsiv = SMMU_EVENT_GSIV + 2,
		.mapping = { { .last = 0xffff, .output_reference = OFFSET_OF(its) } },
	},
	.root_complex = {
		.header = {
			.type = ROOT_COMPLEX,
			.length = sizeof(iort.root_complex),
			.revision = 3,
			.identifier = 2,
			.mapping_count = 1,
			.mapping_offset = __builtin_offsetof(struct root_complex, mapping),
		},
		.cache_coherency = 1,
		.memory_access_flags = MEMORY_CPM | MEMORY_DACS | MEMORY_CANWBS,
		.memory_address_limit = 64,
		.mapping = { { .last = 0xffff, .output_reference = OFFSET_OF(smmu) } },
	},
};

int main(void)
{
	const uint8_t *bytes = (const uint8_t *)&iort;
	uint8_t sum = 0;

	for (size_t i = 0; i < sizeof(iort); i++)
		sum += bytes[i];
	iort.header.checksum = -sum;
	return fwrite(&iort, sizeof(iort), 1, stdout) != 1 || fflush(stdout) != 0;
}
