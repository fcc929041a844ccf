// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver for the edu device of twostage that gives it the address spaces of processes.
 *
 * Each device is /dev/edu_svaN. A process that opens it has its address space bound to the device
 * under a PASID. With EDU_SVA_COPY the device then copies between that process's own addresses;
 * nothing is pinned or mapped for it. Only the process that opened the file may use it: a child
 * that inherits it has another address space.
 *
 * A process that is killed leaves its transfer to the device. Who comes next waits for its end, and
 * so does the unbinding: no DMA with a PASID outlives its binding. Until then the transfer holds the
 * address space: what it asks for is brought. Otherwise the PASID would end with requests
 * outstanding, which Linux 6.12.117 and 7.2.12 do not drain in this case (they clear P of the PASID
 * table's entry before they look at it to decide whether to set FPD, by which the unbinding knows
 * that it must drain): they free what still works on them.
 *
 * For tests: the driver cannot be unbound through sysfs, as files may be open.
 */
#include <linux/atomic.h>
#include <linux/fs.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/wait.h>

#include "edu_sva.h"

/* Registers of BAR 0 (QEMU's docs/specs/edu.rst); the last two are twostage's. */
#define EDU_INTERRUPT_ACKNOWLEDGE 0x64
#define EDU_DMA_SOURCE		  0x80
#define EDU_DMA_DESTINATION	  0x88
#define EDU_DMA_COUNT		  0x90
#define EDU_DMA_COMMAND		  0x98
#define EDU_DMA_PASID		  0xa0
#define EDU_DMA_STATUS		  0xa8

#define EDU_DMA_START	  BIT(0)
#define EDU_DMA_TO_MEMORY BIT(1)
#define EDU_DMA_INTERRUPT BIT(2)
#define EDU_PASID_VALID	  BIT(31)
#define EDU_CAUSE_DMA	  0x100
#define EDU_BUFFER	  0x40000

/* A request for a page that never gets an answer must not hang the test. */
#define EDU_PATIENCE (30 * HZ)

struct edu {
	struct pci_dev *pci;
	void __iomem *registers;
	/* Its owner programs the device. */
	struct mutex lock;
	/* A transfer has been started, and its interrupt has not arrived. */
	bool running;
	wait_queue_head_t ended;
	/* What the transfer uses, with a reference to its users, until its end has been seen. */
	struct mm_struct *uses;
	/* What the registers hold. Writing one is an exit of the virtual machine. */
	u32 pasid;
	u64 source, destination, count;
	struct miscdevice misc;
	char name[16];
};

/* Of an open file. */
struct binding {
	struct edu *edu;
	/* Held, so that no other gets this address. */
	struct mm_struct *mm;
	struct iommu_sva *bond;
	u32 pasid;
};

static irqreturn_t edu_interrupt(int irq, void *context)
{
	struct edu *edu = context;

	writel(EDU_CAUSE_DMA, edu->registers + EDU_INTERRUPT_ACKNOWLEDGE);
	WRITE_ONCE(edu->running, false);
	wake_up_all(&edu->ended);
	return IRQ_HANDLED;
}

/* The transfer has ended. It needs the lock. */
static void let_go(struct edu *edu)
{
	struct mm_struct *uses = edu->uses;

	edu->uses = NULL;
	if (uses)
		mmput(uses);
}

static int wait_for_end(struct edu *edu)
{
	long left = wait_event_killable_timeout(edu->ended, !READ_ONCE(edu->running), EDU_PATIENCE);

	if (left < 0)
		return -EINTR;
	if (left > 0) {
		let_go(edu);
		return 0;
	}
	dev_err(&edu->pci->dev, "a transfer with PASID %u does not end\n", edu->pasid);
	return -ETIMEDOUT;
}

static void set(struct edu *edu, unsigned int offset, u64 *is, u64 value)
{
	if (*is != value)
		writeq(value, edu->registers + offset);
	*is = value;
}

static int transfer(const struct binding *binding, u64 address, u32 length, bool to_memory)
{
	struct edu *edu = binding->edu;
	u32 status;
	int error;

	/* One that its process no longer waits for may be under way. */
	error = wait_for_end(edu);
	if (error)
		return error;
	if (edu->pasid != binding->pasid) {
		writel(EDU_PASID_VALID | binding->pasid, edu->registers + EDU_DMA_PASID);
		edu->pasid = binding->pasid;
	}
	set(edu, EDU_DMA_SOURCE, &edu->source, to_memory ? EDU_BUFFER : address);
	set(edu, EDU_DMA_DESTINATION, &edu->destination, to_memory ? address : EDU_BUFFER);
	set(edu, EDU_DMA_COUNT, &edu->count, length);
	mmget(binding->mm);
	edu->uses = binding->mm;
	WRITE_ONCE(edu->running, true);
	writeq(EDU_DMA_START | EDU_DMA_INTERRUPT | (to_memory ? EDU_DMA_TO_MEMORY : 0), edu->registers + EDU_DMA_COMMAND);
	error = wait_for_end(edu);
	if (error)
		return error;
	/* A device without this register cannot tell. */
	status = readl(edu->registers + EDU_DMA_STATUS);
	return status == 0 || status == U32_MAX ? 0 : -EFAULT;
}

static int copy(const struct binding *binding, struct edu_sva_copy *request)
{
	bool read = request->steps & EDU_SVA_READ, write = request->steps & EDU_SVA_WRITE;
	int error = 0;

	request->done = 0;
	if ((request->steps & ~(EDU_SVA_READ | EDU_SVA_WRITE)) || !(read || write))
		return -EINVAL;
	if (!write && request->length > EDU_SVA_BUFFER)
		return -EINVAL;
	while (!error && request->done < request->length) {
		u32 length = min_t(u32, request->length - request->done, EDU_SVA_BUFFER);

		if (mutex_lock_killable(&binding->edu->lock))
			return -EINTR;
		if (read)
			error = transfer(binding, request->from + request->done, length, false);
		if (write && !error)
			error = transfer(binding, request->to + request->done, length, true);
		mutex_unlock(&binding->edu->lock);
		if (!error)
			request->done += length;
	}
	return error;
}

static long edu_ioctl(struct file *file, unsigned int command, unsigned long argument)
{
	struct binding *binding = file->private_data;
	void __user *user = (void __user *)argument;
	struct edu_sva_copy request;
	int error;

	if (binding->mm != current->mm)
		return -EPERM;
	switch (command) {
	case EDU_SVA_PASID:
		return put_user(binding->pasid, (u32 __user *)user);
	case EDU_SVA_COPY:
		if (copy_from_user(&request, user, sizeof(request)))
			return -EFAULT;
		error = copy(binding, &request);
		if (copy_to_user(user, &request, sizeof(request)))
			return -EFAULT;
		return error;
	default:
		return -ENOTTY;
	}
}

static int edu_open(struct inode *inode, struct file *file)
{
	struct edu *edu = container_of(file->private_data, struct edu, misc);
	struct binding *binding = kzalloc(sizeof(*binding), GFP_KERNEL);
	int error;

	if (!binding)
		return -ENOMEM;
	binding->edu = edu;
	binding->bond = iommu_sva_bind_device(&edu->pci->dev, current->mm);
	if (IS_ERR(binding->bond)) {
		error = PTR_ERR(binding->bond);
		kfree(binding);
		return error;
	}
	binding->pasid = iommu_sva_get_pasid(binding->bond);
	binding->mm = current->mm;
	mmgrab(binding->mm);
	file->private_data = binding;
	return 0;
}

static int edu_release(struct inode *inode, struct file *file)
{
	struct binding *binding = file->private_data;
	struct edu *edu = binding->edu;

	mutex_lock(&edu->lock);
	if (edu->uses == binding->mm) {
		if (wait_event_timeout(edu->ended, !READ_ONCE(edu->running), EDU_PATIENCE))
			let_go(edu);
		else
			dev_err(&edu->pci->dev, "PASID %u is unbound during a transfer that does not end\n",
				binding->pasid);
	}
	mutex_unlock(&edu->lock);
	iommu_sva_unbind_device(binding->bond);
	mmdrop(binding->mm);
	kfree(binding);
	return 0;
}

static const struct file_operations edu_files = {
	.owner = THIS_MODULE,
	.open = edu_open,
	.release = edu_release,
	.unlocked_ioctl = edu_ioctl,
};

/* Since 6.16 binding enables what it needs. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 16, 0)
static int enable_features(struct device *device)
{
	int error = iommu_dev_enable_feature(device, IOMMU_DEV_FEAT_IOPF);

	/* Without page requests, only memory that is present can be used. */
	if (error && error != -ENODEV)
		return error;
	error = iommu_dev_enable_feature(device, IOMMU_DEV_FEAT_SVA);
	if (error)
		iommu_dev_disable_feature(device, IOMMU_DEV_FEAT_IOPF);
	return error;
}

static void disable_features(struct device *device)
{
	iommu_dev_disable_feature(device, IOMMU_DEV_FEAT_SVA);
	iommu_dev_disable_feature(device, IOMMU_DEV_FEAT_IOPF);
}
#else
static int enable_features(struct device *device)
{
	return 0;
}

static void disable_features(struct device *device)
{
}
#endif

static int edu_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	static atomic_t devices = ATOMIC_INIT(0);
	struct device *device = &pci->dev;
	struct edu *edu;
	int error;

	edu = devm_kzalloc(device, sizeof(*edu), GFP_KERNEL);
	if (!edu)
		return -ENOMEM;
	edu->pci = pci;
	mutex_init(&edu->lock);
	init_waitqueue_head(&edu->ended);
	error = pcim_enable_device(pci);
	if (error)
		return error;
	edu->registers = pcim_iomap(pci, 0, 0);
	if (!edu->registers)
		return -ENOMEM;
	pci_set_master(pci);
	error = pci_alloc_irq_vectors(pci, 1, 1, PCI_IRQ_MSI);
	if (error < 0)
		return error;
	error = request_irq(pci_irq_vector(pci, 0), edu_interrupt, 0, "edu_sva", edu);
	if (error)
		goto free_vectors;
	error = enable_features(device);
	if (error) {
		dev_err(device, "shared virtual addressing cannot be enabled: %d\n", error);
		goto free_interrupt;
	}
	snprintf(edu->name, sizeof(edu->name), "edu_sva%d", atomic_inc_return(&devices) - 1);
	edu->misc.minor = MISC_DYNAMIC_MINOR;
	edu->misc.name = edu->name;
	edu->misc.fops = &edu_files;
	edu->misc.parent = device;
	error = misc_register(&edu->misc);
	if (error)
		goto disable;
	pci_set_drvdata(pci, edu);
	return 0;

disable:
	disable_features(device);
free_interrupt:
	free_irq(pci_irq_vector(pci, 0), edu);
free_vectors:
	pci_free_irq_vectors(pci);
	return error;
}

static void edu_remove(struct pci_dev *pci)
{
	struct edu *edu = pci_get_drvdata(pci);

	misc_deregister(&edu->misc);
	disable_features(&pci->dev);
	free_irq(pci_irq_vector(pci, 0), edu);
	pci_free_irq_vectors(pci);
	pci_clear_master(pci);
}

static const struct pci_device_id edu_ids[] = { { PCI_DEVICE(0x1234, 0x11e8) }, {} };
MODULE_DEVICE_TABLE(pci, edu_ids);

static struct pci_driver edu_driver = {
	.name = "edu_sva",
	.id_table = edu_ids,
	.probe = edu_probe,
	.remove = edu_remove,
	.driver.suppress_bind_attrs = true,
};
module_pci_driver(edu_driver);

MODULE_DESCRIPTION("Gives the edu device of twostage the address spaces of processes");
MODULE_LICENSE("GPL");
