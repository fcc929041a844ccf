// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The multiboot-1 header. Only the 32-bit image is linked with it: a loader that finds it in a
// 64-bit ELF refuses the file instead of trying PVH.

        .equ    MAGIC, 0x1badb002
        .equ    MEMORY_INFO, 1 << 1

        .section .multiboot, "a"
        .balign 4
        .long   MAGIC
        .long   MEMORY_INFO
        .long   -(MAGIC + MEMORY_INFO)
