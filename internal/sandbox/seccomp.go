package sandbox

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (seccomp(2)). An argument's lower half comes first: both
// architectures are little endian.
const (
	dataCall = 0
	dataArch = 4
	dataArgs = 16
)

// What becomes of a call.
const (
	permit   = unix.SECCOMP_RET_ALLOW
	refuse   = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	unknown  = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	x32Calls = 0x40000000 // and above: amd64's second set of numbers for the same calls
)

func seccompSupported() error {
	if auditArch == 0 {
		return errors.New("there is no list of system calls for this architecture")
	}
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if errno != 0 {
		return fmt.Errorf("this kernel has none (CONFIG_SECCOMP_FILTER): %w", errno)
	}
	return nil
}

// filterCalls has every thread, and all programs that the process starts, be refused calls.
func filterCalls(o Options) error { return install(filter(o)) }

func install(program []unix.SockFilter) error {
	prog := &unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(prog)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return errno
	}
	if thread != 0 {
		return fmt.Errorf("thread %d has a filter of its own", thread)
	}
	return nil
}

// filter is the program that the kernel asks for each call. Calls that are always let
// through it does not ask for again (seccomp_cache_check_allow, since 5.11).
func filter(o Options) []unix.SockFilter {
	program := []unix.SockFilter{
		load(dataArch),
		jump(unix.BPF_JEQ, auditArch, 1, 0),
		result(refuse),
		load(dataCall),
	}
	if auditArch == unix.AUDIT_ARCH_X86_64 {
		program = append(program, jump(unix.BPF_JGE, x32Calls, 0, 1), result(refuse))
	}
	for _, call := range refused() {
		program = append(program, jump(unix.BPF_JEQ, call, 0, 1), result(refuse))
	}
	program = when(program, unix.SYS_CLONE, 0, namespaces)
	program = when(program, unix.SYS_UNSHARE, 0, namespaces|unix.CLONE_NEWTIME)
	// Its flags are in memory, out of the filter's reach; who calls it falls back to clone.
	program = append(program, jump(unix.BPF_JEQ, unix.SYS_CLONE3, 0, 1), result(unknown))
	program = when(program, unix.SYS_PRLIMIT64, 0, ^uint32(0)) // limits of other processes
	if !o.UnixSockets {
		program = only(program, unix.SYS_SOCKET, 0, unix.AF_INET, unix.AF_INET6, unix.AF_NETLINK)
	}
	return append(program, result(permit))
}

// namespaces are clone's flags that make one.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// when refuses call if a bit of mask is set in its argument.
func when(program []unix.SockFilter, call uint32, argument int, mask uint32) []unix.SockFilter {
	return append(program,
		jump(unix.BPF_JEQ, call, 0, 4),
		load(dataArgs+8*argument),
		jump(unix.BPF_JSET, mask, 0, 1),
		result(refuse),
		result(permit),
	)
}

// only refuses call unless its argument is one of values.
func only(program []unix.SockFilter, call uint32, argument int, values ...uint32) []unix.SockFilter {
	program = append(program, jump(unix.BPF_JEQ, call, 0, uint8(len(values)+3)), load(dataArgs+8*argument))
	for i, v := range values {
		program = append(program, jump(unix.BPF_JEQ, v, uint8(len(values)-i), 0))
	}
	return append(program, result(refuse), result(permit))
}

func load(offset int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: uint32(offset)}
}

// jump skips so many instructions, depending on what was loaded last.
func jump(test uint16, value uint32, yes, no uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | test | unix.BPF_K, Jt: yes, Jf: no, K: value}
}

func result(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}
