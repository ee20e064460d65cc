package erofsd

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/sandbox"
	"github.com/erofsd/erofsd/internal/testenv"
)

// withoutCgo returns erofsd as it is released. With cgo, as the race detector has it, there
// is no sandbox.
func withoutCgo(t *testing.T) string {
	t.Helper()
	if len(sandbox.Probe().Holds) > 0 {
		return "/proc/self/exe"
	}
	program := filepath.Join(testDir(t), "erofsd")
	cmd := exec.Command("go", "build", "-o", program, "../../cmd/erofsd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return program
}

// A confined is an erofsd in its sandbox.
type confined struct {
	*process
	*api.Client
	t         *testing.T
	dir, root string
	point     string
}

// confine starts one, with a directory that everybody can reach.
func confine(t *testing.T, args ...string) *confined {
	t.Helper()
	testenv.Root(t)
	c := &confined{t: t, dir: testDir(t)}
	testenv.Kernel(t, "fanotify", fanotify.Supported(c.dir))
	program := withoutCgo(t)
	c.root, c.point = filepath.Join(c.dir, "root"), filepath.Join(c.dir, "m")
	if err := errors.Join(os.Chmod(c.dir, 0o755), os.Mkdir(c.point, 0o755)); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(c.dir, "s", "api.sock")
	c.Client = api.NewClient(socket)
	t.Cleanup(func() {
		for _, pid := range c.processes("") {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		syscall.Unmount(c.point, syscall.MNT_DETACH) // if it is mounted still
		c.Client.Close()
	})
	c.process = beginProgram(t, program, nil, socket,
		append([]string{Name, "--root", c.root, "--socket", socket, "--transport", "fanotify"}, args...)...)
	return c
}

// processes returns those of c whose name begins with prefix.
func (c *confined) processes(prefix string) (pids []int) {
	names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range names {
		line, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(line), c.root) || !strings.HasPrefix(string(line), prefix) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name))); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// worker waits for a worker that serves, and is none of old, and returns its process.
func (c *confined) worker(old ...int) int {
	c.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		st, err := c.Status(c.t.Context())
		if err == nil && !slices.Contains(old, st.PID) {
			return st.PID
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("no worker serves: %v; it said:\n%s", err, c.said.String())
		}
	}
}

// threads compares the status of every thread of a worker.
func (c *confined) threads(pid int, want map[string]string) {
	c.t.Helper()
	names, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/status")
	if err != nil || len(names) == 0 {
		c.t.Fatalf("no threads of %d: %v", pid, err)
	}
	for _, name := range names {
		text, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		for key, value := range want {
			if !strings.Contains(string(text), "\n"+key+":\t"+value+"\n") {
				c.t.Errorf("%s: %s is not %q, %v:\n%s", name, key, value, err, text)
			}
		}
	}
}

// mount mounts an image and compares all of it.
func (c *confined) mount(r api.MountRequest) {
	c.t.Helper()
	r.Mountpoint = c.point
	if _, err := c.Mount(c.t.Context(), r); err != nil {
		c.t.Fatalf("%v; it said:\n%s", err, c.said.String())
	}
	c.compare()
}

func (c *confined) compare() {
	c.t.Helper()
	tree := testenv.LoadTree(c.t, "tree.jsonl")
	top := tree["."]
	top.Mtime = 0 // nydus-image gave it none
	tree["."] = top
	got, err := testenv.ScanTree(c.point, true)
	if err != nil {
		c.t.Fatal(err)
	}
	tree.Compare(c.t, got, false)
}

func (c *confined) umount() {
	c.t.Helper()
	if err := c.Unmount(c.t.Context(), api.UnmountRequest{Mountpoint: c.point}); err != nil {
		c.t.Fatalf("%v; it said:\n%s", err, c.said.String())
	}
}

// image copies an image for a user alone.
func (c *confined) image(uid int) api.MountRequest {
	c.t.Helper()
	dir := filepath.Join(c.dir, "image")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(testenv.Fixtures(c.t), "zstd"))); err != nil {
		c.t.Fatal(err)
	}
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o600)
		if e.IsDir() {
			mode = 0o700
		}
		return errors.Join(os.Chown(name, uid, uid), os.Chmod(name, mode))
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return api.MountRequest{Bootstrap: filepath.Join(dir, "image.boot"), BlobDir: filepath.Join(dir, "blobs")}
}

// TestSandbox: a daemon does all its work in its sandbox, and each of its successors is in
// one too: after an upgrade, a kill, and the death of the process that mounts.
func TestSandbox(t *testing.T) {
	for name, tc := range map[string]struct {
		args  []string
		owner int // of the image's files
		want  map[string]string
	}{
		"root": {nil, 12345, map[string]string{
			"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000004", "CapPrm": "0000000000000004", "Uid": "0\t0\t0\t0",
		}},
		"user": {[]string{"--user", "nobody"}, 65534, map[string]string{
			"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000000", "CapPrm": "0000000000000000", "Uid": "65534\t65534\t65534\t65534",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := confine(t, append(tc.args, "--sandbox", "strict", "--log-file", filepath.Join(testDir(t), "log"))...)
			r := c.image(tc.owner)
			first := c.worker()
			c.threads(first, tc.want)
			c.mount(r)
			if st, err := c.Status(t.Context()); err != nil || st.Sandbox.Mode != "strict" || len(st.Sandbox.Lacks) != 0 || len(st.Sandbox.Holds) < 4 {
				t.Errorf("status says %+v, %v", st.Sandbox, err)
			}
			if _, err := c.Scrub(t.Context(), api.ScrubRequest{}); err != nil {
				t.Error(err)
			}
			if err := c.Upgrade(t.Context(), api.UpgradeRequest{}); err != nil {
				t.Fatalf("%v; it said:\n%s", err, c.said.String())
			}
			second := c.worker(first)
			c.threads(second, tc.want)
			c.compare()
			if err := syscall.Kill(second, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			third := c.worker(first, second)
			c.compare()
			mounters := c.processes("erofsd-mounter")
			for _, pid := range mounters {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			if len(mounters) == 0 {
				t.Error("there is no process that mounts")
			}
			fourth := c.worker(first, second, third)
			c.threads(fourth, tc.want)
			c.umount()
			if a, err := c.Evict(t.Context(), api.EvictRequest{}); err != nil || a.Images != 0 {
				t.Errorf("evict: %+v, %v", a, err)
			}
			c.mount(r)
			c.umount()
			c.signal(t, syscall.SIGTERM)
			c.end(t, 0)
			for deadline := time.Now().Add(patience); len(c.processes("")) > 0; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("processes %v are left", c.processes(""))
				}
			}
		})
	}
}

// TestUserRefused: a user who could not do all of a daemon's work does none.
func TestUserRefused(t *testing.T) {
	testenv.Root(t)
	dir := testDir(t)
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	root := filepath.Join(dir, "root")
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"--user", "nobody-of-this-name"}, "become user nobody-of-this-name"},
		{[]string{"--user", "nobody", "--sandbox", "off"}, "daemon.user: has no effect"},
		{[]string{"--user", "nobody", "--supervisor", "/x", "--id", "i"}, "does not go with --supervisor"},
		{[]string{"--user", "nobody"}, "has what cachefiles has kept"},
	} {
		if err := os.MkdirAll(filepath.Join(root, "fscache"), 0o700); err != nil {
			t.Fatal(err)
		}
		args := append([]string{"--keeper=false", "--transport", "fanotify", "--root", root, "--socket", filepath.Join(dir, "sock")}, tc.args...)
		if said, code := erofsd(t, nil, args...); code == 0 || !strings.Contains(said, tc.want) {
			t.Errorf("%q: exit code %d: %s", tc.args, code, said)
		}
	}
}

// landlessName is argv[0] of a process that becomes another, without Landlock.
const landlessName = "without-landlock"

// runLandless executes args in a kernel that says it has no Landlock.
func runLandless(args []string) error {
	const call, answer = 444, unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS) // landlock_create_ruleset
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}, // the number of the call
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: call, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: answer},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := &unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	runtime.LockOSThread() // only this thread survives
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(program))); errno != 0 {
		return errno
	}
	return syscall.Exec(args[0], args[1:], os.Environ())
}

// TestWithoutLandlock: what the kernel has not, a daemon does without, and says so; unless it
// shall have all.
func TestWithoutLandlock(t *testing.T) {
	testenv.Root(t)
	dir := testDir(t)
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	program := withoutCgo(t)
	socket := filepath.Join(dir, "sock")
	args := []string{landlessName, program, Name, "--keeper=false", "--root", filepath.Join(dir, "root"), "--socket", socket, "--transport", "fanotify"}

	cmd := exec.Command("/proc/self/exe")
	cmd.Args = append(slices.Clone(args), "--sandbox", "strict")
	said, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 1 || !strings.Contains(string(said), "lacks landlock: this kernel has none") {
		t.Errorf("strict: %v: %s", err, said)
	}
	if _, err := os.Stat(filepath.Join(dir, "root")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a start that failed left something: %v", err)
	}

	p := begin(t, nil, socket, args...)
	client := api.NewClient(socket)
	defer client.Close()
	st, err := client.Status(t.Context())
	if err != nil || len(st.Sandbox.Lacks) != 1 || !slices.Contains(st.Sandbox.Holds, "seccomp") {
		t.Errorf("status says %+v, %v", st.Sandbox, err)
	}
	p.signal(t, syscall.SIGTERM)
	p.end(t, 0)
	if !strings.Contains(p.said.String(), "WARN sandbox: ") {
		t.Errorf("it said:\n%s", p.said.String())
	}
}
