package sandbox

import "golang.org/x/sys/unix"

// auditArch is what the kernel calls this architecture.
const auditArch = uint32(unix.AUDIT_ARCH_X86_64)

// architectureCalls are those that only this architecture has.
func architectureCalls() []uint32 {
	return []uint32{
		unix.SYS_CHMOD, unix.SYS_CHOWN, unix.SYS_LCHOWN, unix.SYS_KEXEC_FILE_LOAD,
		unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_USELIB, unix.SYS_SYSFS, unix.SYS__SYSCTL, unix.SYS_CREATE_MODULE,
	}
}
