// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
#include "lib/loader.h"
#include "lib/cmdline.h"

#define MULTIBOOT_MAGIC 0x2badb002u
#define MULTIBOOT_HAS_CMDLINE BIT(2)
#define PVH_MAGIC 0x336ec578u

struct multiboot_info {
    u32 flags, memory_lower, memory_upper, boot_device, cmdline;
};

struct hvm_start_info {
    u32 magic, version, flags, module_count;
    u64 modules, cmdline;
};

static bool by_multiboot;

void loader_init(u32 magic, u64 start_info)
{
    if (magic == MULTIBOOT_MAGIC) {
        const struct multiboot_info *info = (const void *)(uintptr_t)start_info;

        by_multiboot = true;
        if (info->flags & MULTIBOOT_HAS_CMDLINE)
            cmdline_set((const char *)(uintptr_t)info->cmdline);
    } else {
        const struct hvm_start_info *info = (const void *)(uintptr_t)start_info;

        if (info->magic == PVH_MAGIC && info->cmdline)
            cmdline_set((const char *)(uintptr_t)info->cmdline);
    }
}

const char *boot_protocol(void)
{
    return by_multiboot ? "multiboot" : "PVH";
}
