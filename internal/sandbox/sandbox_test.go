package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// childName is argv[0] of a process that enters a sandbox and tries what it can do.
const childName = "in-a-sandbox"

// whoName is argv[0] of a process that says who runs it.
const whoName = "who-runs-this"

// none is no capability, as /proc/PID/status has it.
const none = "0000000000000000"

func TestMain(m *testing.M) {
	switch os.Args[0] {
	case childName:
		runChild(os.Args[1])
		return
	case whoName:
		status, err := os.ReadFile("/proc/self/status")
		if err != nil {
			panic(err)
		}
		fmt.Printf("%d\n%s", os.Geteuid(), status)
		return
	}
	testenv.Main(m)
}

// A task is what such a process does.
type task struct {
	Enter   bool
	Options Options
	Inside  string // beneath a writable directory
	Outside string // beneath none
	// HideLandlock makes it a kernel without.
	HideLandlock bool
	Setuid       string // this program, of another user with its setuid bit
}

// findings are what it saw.
type findings struct {
	Report  Report
	Err     string
	Threads []map[string]string // lines of /proc/self/task/*/status
	Tried   map[string]string   // what came of each attempt; "": it worked
	Said    string              // by Setuid: its user
	Child   map[string]string   // and its status
}

func runChild(text string) {
	var t task
	if err := json.Unmarshal([]byte(text), &t); err != nil {
		panic(err)
	}
	// Threads in every state: one that waits in the kernel, and some that work.
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	go func() {
		runtime.LockOSThread()
		_, _ = unix.Read(int(r.Fd()), make([]byte, 1))
	}()
	var stop atomic.Bool
	for range 4 {
		go func() {
			runtime.LockOSThread()
			for !stop.Load() {
			}
		}()
	}
	if t.HideLandlock {
		if err := hideLandlock(); err != nil {
			panic(err)
		}
	}
	var f findings
	if t.Enter {
		f.Report, err = Enter(t.Options)
		f.Err = fmt.Sprint(err)
	}
	runtime.GC() // the runtime's threads signal each other
	f.Threads = threads()
	f.Tried = map[string]string{}
	for name, try := range attempts(t) {
		f.Tried[name] = ""
		if err := try(); err != nil {
			var errno syscall.Errno
			if !errors.As(err, &errno) {
				panic(fmt.Sprintf("%s: %v", name, err))
			}
			f.Tried[name] = unix.ErrnoName(errno)
		}
	}
	who := exec.Command(t.Setuid)
	who.Args = []string{whoName}
	said, err := who.Output()
	if err != nil {
		panic(err)
	}
	user, status, _ := strings.Cut(string(said), "\n")
	f.Said, f.Child = user, parseStatus(status)
	stop.Store(true)
	w.Close()
	if err := json.NewEncoder(os.Stdout).Encode(f); err != nil {
		panic(err)
	}
}

func threads() (all []map[string]string) {
	names, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		panic(err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			panic(err)
		}
		all = append(all, parseStatus(string(text)))
	}
	return all
}

func parseStatus(text string) map[string]string {
	status := map[string]string{}
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	return status
}

// attempts are what a process may or may not do. Outside of a sandbox all of it works, but
// for what is no more than a wrong argument.
func attempts(t task) map[string]func() error {
	in := func(name string) string { return filepath.Join(t.Inside, name) }
	out := func(name string) string { return filepath.Join(t.Outside, name) }
	raw := func(call, a1, a2 uintptr) error {
		if _, _, errno := unix.Syscall(call, a1, a2, 0); errno != 0 {
			return errno
		}
		return nil
	}
	socket := func(domain, kind int) error {
		fd, err := unix.Socket(domain, kind, 0)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	}
	return map[string]func() error{
		"mount": func() error {
			return errors.Join(unix.Mount("x", out("dir"), "tmpfs", 0, ""), unix.Unmount(out("dir"), 0))
		},
		"fsopen":      func() error { return raw(unix.SYS_FSOPEN, 0, 0) },
		"load module": func() error { return raw(unix.SYS_INIT_MODULE, 0, 0) },
		"ptrace":      func() error { return unix.PtraceSeize(os.Getppid()) },
		"setns":       func() error { return raw(unix.SYS_SETNS, ^uintptr(0), 0) },
		"unshare": func() error {
			cmd := exec.Command("/proc/self/exe")
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
			cmd.Args = []string{childName + "-not", "-test.run=^$"}
			return cmd.Run()
		},
		"unshare files":   func() error { return inThread(func() error { return unix.Unshare(unix.CLONE_FS) }) },
		"clone3":          func() error { return raw(unix.SYS_CLONE3, 0, 0) },
		"signal parent":   func() error { return unix.Kill(os.Getppid(), 0) },
		"signal itself":   func() error { return unix.Kill(os.Getpid(), 0) },
		"limit parent":    func() error { return unix.Prlimit(os.Getppid(), unix.RLIMIT_NOFILE, nil, new(unix.Rlimit)) },
		"limit itself":    func() error { return unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, new(unix.Rlimit)) },
		"unix socket":     func() error { return socket(unix.AF_UNIX, unix.SOCK_STREAM) },
		"packet socket":   func() error { return socket(unix.AF_PACKET, unix.SOCK_RAW) },
		"inet socket":     func() error { return socket(unix.AF_INET, unix.SOCK_STREAM) },
		"listen":          func() error { return listen() },
		"socket pair":     func() error { _, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0); return err },
		"fanotify group":  func() error { return raw(unix.SYS_FANOTIFY_INIT, 0, 0) },
		"change mode":     func() error { return os.Chmod(in("file"), 0o600) },
		"change time":     func() error { return unix.UtimesNano(in("file"), make([]unix.Timespec, 2)) },
		"write inside":    func() error { return os.WriteFile(in("new"), []byte("x"), 0o600) },
		"append inside":   func() error { return os.WriteFile(in("file"), []byte("x"), 0o600) },
		"rename inside":   func() error { return errors.Join(os.WriteFile(in("a"), nil, 0o600), os.Rename(in("a"), in("b"))) },
		"link inside":     func() error { return errors.Join(os.Remove(in("link")), os.Link(in("file"), in("link"))) },
		"mkdir inside":    func() error { return errors.Join(os.Mkdir(in("d"), 0o700), os.Remove(in("d"))) },
		"read outside":    func() error { _, err := os.ReadFile(out("file")); return err },
		"read private":    func() error { _, err := os.ReadFile(out("private")); return err },
		"write outside":   func() error { return os.WriteFile(out("file"), []byte("x"), 0o600) },
		"make outside":    func() error { return os.WriteFile(out("new"), []byte("x"), 0o600) },
		"remove outside":  func() error { return os.Remove(out("other")) },
		"move outside":    func() error { return os.Rename(in("mover"), out("mover")) },
		"write /dev/null": func() error { return os.WriteFile("/dev/null", []byte("x"), 0) },
		"write /proc":     func() error { return os.WriteFile("/proc/self/comm", []byte("x"), 0) },
	}
}

func inThread(do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and ends with its goroutine
		done <- do()
	}()
	return <-done
}

func listen() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	return l.Close()
}

// try runs a process with the directories that it wants. change says what it is told.
func try(t *testing.T, change func(*task)) findings {
	t.Helper()
	testenv.Root(t)
	program := withoutCgo(t)
	dir := t.TempDir()
	for p := dir; p != "/"; p = filepath.Dir(p) { // for who is not root
		if st, err := os.Stat(p); err == nil && st.Mode().Perm()&0o011 != 0o011 {
			if err := os.Chmod(p, st.Mode().Perm()|0o011); err != nil {
				t.Fatal(err)
			}
		}
	}
	k := task{Enter: true, Inside: filepath.Join(dir, "inside"), Outside: filepath.Join(dir, "outside"), Setuid: filepath.Join(dir, "id")}
	for _, name := range []string{k.Inside, k.Outside, filepath.Join(k.Outside, "dir")} {
		if err := os.Mkdir(name, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"inside/file", "inside/link", "inside/mover", "outside/file", "outside/other", "outside/private"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("old"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p, err := os.ReadFile(program)
	if err == nil {
		err = os.WriteFile(k.Setuid, p, 0o755)
	}
	// Another user's, once to be run as that user, once to be read.
	for _, name := range []string{k.Setuid, filepath.Join(k.Outside, "private")} {
		err = errors.Join(err, os.Chown(name, 12345, 12345))
	}
	err = errors.Join(err, os.Chmod(k.Setuid, 0o755|os.ModeSetuid), os.Chmod(filepath.Join(k.Outside, "private"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	k.Options = Options{Capabilities: []int{unix.CAP_DAC_READ_SEARCH}, Writable: []string{k.Inside}}
	change(&k)
	text, err := json.Marshal(k)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program)
	cmd.Args = []string{childName, string(text)}
	cmd.Stderr = &testenv.Buffer{}
	said, err := cmd.Output()
	var f findings
	if err == nil {
		err = json.Unmarshal(said, &f)
	}
	if err != nil {
		t.Fatalf("%v; it said:\n%s", err, cmd.Stderr)
	}
	if k.Enter && f.Err != "<nil>" {
		t.Fatalf("Enter: %s", f.Err)
	}
	return f
}

// withoutCgo returns this program without cgo: the race detector needs it.
func withoutCgo(t *testing.T) string {
	t.Helper()
	if len(Probe().Holds) > 0 {
		return "/proc/self/exe"
	}
	program := filepath.Join(t.TempDir(), "test")
	cmd := exec.Command("go", "test", "-c", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}

// expect compares what was tried with what is wanted; what want does not name has to work.
func expect(t *testing.T, f findings, want map[string]string) {
	t.Helper()
	for name, got := range f.Tried {
		if got != want[name] {
			t.Errorf("%s: got %q, want %q", name, got, want[name])
		}
	}
	for name := range want {
		if _, found := f.Tried[name]; !found {
			t.Errorf("%s was not tried", name)
		}
	}
}

// everyThread compares the state of all threads, and that no program brings more than
// no_new_privs allows.
func everyThread(t *testing.T, f findings, want map[string]string) {
	t.Helper()
	if len(f.Threads) < 6 {
		t.Errorf("only %d threads were looked at", len(f.Threads))
	}
	if f.Child["NoNewPrivs"] != "1" || f.Child["Seccomp"] != "2" || f.Child["CapEff"] != none || f.Child["CapPrm"] != none {
		t.Errorf("a program that it runs has %q", f.Child)
	}
	for _, thread := range f.Threads {
		for key, value := range want {
			if thread[key] != value {
				t.Errorf("thread %s: %s is %q, want %q", thread["Pid"], key, thread[key], value)
			}
		}
	}
}

// TestOutside shows that the attempts work where there is no sandbox: else what fails in one
// would show nothing.
func TestOutside(t *testing.T) {
	f := try(t, func(k *task) { k.Enter = false })
	expect(t, f, map[string]string{
		"fsopen": "EFAULT", "load module": modules(), "setns": "EBADF", "clone3": "EINVAL",
	})
	if f.Said != "12345" {
		t.Errorf("the setuid program says %q", f.Said)
	}
}

// modules is what init_module says to a wrong argument.
func modules() string {
	if _, err := os.Stat("/proc/modules"); err != nil {
		return "ENOSYS"
	}
	return "EFAULT"
}

// confined is what a sandbox refuses on a kernel that has all of it.
func confined() map[string]string {
	return map[string]string{
		"mount": "EPERM", "fsopen": "EPERM", "load module": "EPERM", "ptrace": "EPERM", "setns": "EPERM", "unshare": "EPERM", "clone3": "ENOSYS",
		"limit parent": "EPERM", "unix socket": "EPERM", "packet socket": "EPERM", "fanotify group": "EPERM", "change mode": "EPERM",
		"write outside": "EACCES", "make outside": "EACCES", "remove outside": "EACCES", "write /proc": "EACCES",
		"move outside": "EACCES", "signal parent": "EPERM",
	}
}

func needLandlock(t *testing.T, abi int) {
	t.Helper()
	if have, err := landlockABI(); err != nil || have < abi {
		testenv.Need(t, "landlock", fmt.Sprintf("needs Landlock %d, not %d: %v", abi, have, err))
	}
}

// TestInside: as root, which keeps one capability.
func TestInside(t *testing.T) {
	needLandlock(t, abiScopes+1)
	f := try(t, func(*task) {})
	if !f.Report.Complete() {
		t.Errorf("it lacks %q", f.Report.Lacks)
	}
	expect(t, f, confined())
	const readSearch = "0000000000000004"
	everyThread(t, f, map[string]string{
		"NoNewPrivs": "1", "Seccomp": "2", "CapEff": readSearch, "CapPrm": readSearch,
		"CapInh": none, "CapAmb": none,
	})
	if f.Said != "0" {
		t.Errorf("the setuid program says %q: it has got somebody's privileges", f.Said)
	}
}

// TestUser: another user has no capability, and the files of that user.
func TestUser(t *testing.T) {
	needLandlock(t, abiScopes+1)
	f := try(t, func(k *task) {
		k.Options.User = &User{UID: 54321, GID: 54322}
		names, err := filepath.Glob(k.Inside + "*/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range append(names, k.Inside) {
			if err := os.Chown(name, 54321, 54322); err != nil {
				t.Fatal(err)
			}
		}
	})
	want := confined()
	want["read private"] = "EACCES"
	expect(t, f, want)
	everyThread(t, f, map[string]string{
		"NoNewPrivs": "1", "Seccomp": "2", "CapEff": none, "CapPrm": none,
		"Uid": "54321\t54321\t54321\t54321", "Gid": "54322\t54322\t54322\t54322", "Groups": "",
	})
	if f.Said != "54321" {
		t.Errorf("the setuid program says %q", f.Said)
	}
}

// TestRemovable: files can be removed, and nothing else.
func TestRemovable(t *testing.T) {
	needLandlock(t, abiScopes+1)
	f := try(t, func(k *task) {
		k.Options.Removable, k.Options.UnixSockets = []string{k.Outside}, true
	})
	want := confined()
	delete(want, "remove outside")
	delete(want, "unix socket")
	expect(t, f, want)
}

// TestWithoutLandlock: what a kernel lacks is in the report, and the rest holds.
func TestWithoutLandlock(t *testing.T) {
	f := try(t, func(k *task) { k.HideLandlock = true })
	if f.Report.Complete() || !strings.Contains(f.Report.String(), "lacks landlock") {
		t.Errorf("the report says %s", f.Report)
	}
	want := confined()
	for _, name := range []string{"write outside", "make outside", "remove outside", "move outside", "write /proc", "signal parent"} {
		delete(want, name)
	}
	expect(t, f, want)
	everyThread(t, f, map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000004"})
}

// hideLandlock has the kernel deny that it has Landlock, for this process.
func hideLandlock() error {
	program := []unix.SockFilter{
		load(dataCall),
		jump(unix.BPF_JEQ, unix.SYS_LANDLOCK_CREATE_RULESET, 0, 1),
		result(unknown),
		result(permit),
	}
	return install(program)
}
