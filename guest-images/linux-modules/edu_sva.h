/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR BSD-3-Clause */
/* What a program and edu_sva.c tell each other. */
#ifndef EDU_SVA_H
#define EDU_SVA_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Steps of a copy. */
#define EDU_SVA_READ  (1 << 0) /* from memory into the device's buffer */
#define EDU_SVA_WRITE (1 << 1) /* from the buffer to memory */

/* The length of the buffer, in bytes. */
#define EDU_SVA_BUFFER 4096

/*
 * The device copies `length` bytes with the steps `steps`, a buffer at a time: with both steps from
 * `from` to `to`, with EDU_SVA_WRITE alone the same buffer again and again. Others may use the
 * buffer between two calls, and between two buffers. `from` and `to` are addresses of the calling
 * process; `done` is how many bytes were copied, also after an error: EFAULT when the device may
 * not access an address, EINTR when a signal killed the process (the device goes on), ETIMEDOUT
 * when the device does not end.
 */
struct edu_sva_copy {
	__u64 from;
	__u64 to;
	__u32 length;
	__u32 steps;
	__u64 done;
};

#define EDU_SVA_PASID _IOR('e', 0x60, __u32)
#define EDU_SVA_COPY  _IOWR('e', 0x61, struct edu_sva_copy)

#endif
