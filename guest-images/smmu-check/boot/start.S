// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The way from the loader to C: the header of a Linux Image (Documentation/arch/arm64/booting.rst),
// then an identity map. The loader enters with translation off and the device tree's address in X0.
// It may have put the image anywhere, so pointers in it are corrected first.

        .equ    IMAGE_FLAGS, 1 << 3 | 1 << 1    // anywhere in memory; pages of 4 KiB
        .equ    R_AARCH64_RELATIVE, 1027

        // Translation: 39 bits, pages of 4 KiB, from level 1, where an entry is 1 GiB; tables
        // cached.
        .equ    TCR, (64 - 39) | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32
        .equ    MAIR, 0xff << 8                 // attribute 0: device; 1: memory, cached
        .equ    BLOCK_DEVICE, 1 | 1 << 10 | 3 << 53
        .equ    BLOCK_MEMORY, 1 | 1 << 2 | 3 << 8 | 1 << 10
        .equ    GIB, 1 << 30
        .equ    SCTLR_M_C_I, 1 << 0 | 1 << 2 | 1 << 12

        .section .head, "ax"
        .global image_start
image_start:
        b       start
        .word   0
        .quad   0                               // text offset
        .long   image_size, 0                   // as 64 bits it would be a pointer to correct
        .quad   IMAGE_FLAGS
        .quad   0, 0, 0
        .ascii  "ARM\x64"
        .word   0

start:
        mov     x19, x0
        adr     x20, image_start
        adrp    x0, relocations
        add     x0, x0, :lo12:relocations
        adrp    x1, relocations_end
        add     x1, x1, :lo12:relocations_end
1:      cmp     x0, x1
        b.hs    2f
        ldp     x2, x3, [x0], #16               // offset, kind
        ldr     x4, [x0], #8                    // addend
        cmp     x3, #R_AARCH64_RELATIVE
        b.ne    1b
        add     x4, x4, x20
        str     x4, [x20, x2]
        b       1b

2:      adrp    x0, bss_start
        add     x0, x0, :lo12:bss_start
        adrp    x1, image_end
        add     x1, x1, :lo12:image_end
3:      cmp     x0, x1
        b.hs    4f
        stp     xzr, xzr, [x0], #16
        b       3b

        // The first GiB is devices', the others are memory.
4:      adrp    x0, map
        ldr     x1, =BLOCK_DEVICE
        str     x1, [x0]
        ldr     x1, =BLOCK_MEMORY
        mov     x2, #1
5:      add     x3, x1, x2, lsl #30
        str     x3, [x0, x2, lsl #3]
        add     x2, x2, #1
        cmp     x2, #512
        b.lo    5b
        msr     ttbr0_el1, x0
        ldr     x0, =MAIR
        msr     mair_el1, x0
        ldr     x0, =TCR
        msr     tcr_el1, x0
        adrp    x0, vectors
        add     x0, x0, :lo12:vectors
        msr     vbar_el1, x0
        dsb     sy
        isb
        tlbi    vmalle1
        dsb     sy
        isb
        mrs     x0, sctlr_el1
        ldr     x1, =SCTLR_M_C_I
        orr     x0, x0, x1
        msr     sctlr_el1, x0
        isb

        adrp    x0, stack_top
        add     x0, x0, :lo12:stack_top
        mov     sp, x0
        mov     x0, x19
        bl      guest_main
6:      wfi
        b       6b

        .ltorg

        // Whatever comes is an error: there are no interrupts.
        .balign 0x800
vectors:
        .rept   16
        .balign 0x80
        mrs     x0, esr_el1
        mrs     x1, elr_el1
        mrs     x2, far_el1
        b       exception
        .endr

        .bss
        .balign 4096
map:    .skip   4096
stack:  .skip   65536
stack_top:
