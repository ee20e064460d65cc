package fanotify

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// readerEnv makes the test binary a reader: whoever reads a watched file must be
// another process, because a group's owner never waits for itself.
const readerEnv = "EROFSD_FANOTIFY_READER"

func TestMain(m *testing.M) {
	if os.Getenv(readerEnv) != "" {
		readerMain(os.Stdin, os.Stdout)
		return
	}
	testenv.Main(m)
}

// A reader is a child process that does what it is asked to with one file.
type reader struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startReader(t testing.TB, attr *syscall.SysProcAttr) *reader {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r := &reader{t: t, cmd: exec.Command(exe)}
	r.cmd.Env = append(os.Environ(), readerEnv+"=1")
	r.cmd.Stderr = os.Stderr
	r.cmd.SysProcAttr = attr
	if r.in, err = r.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = bufio.NewReader(out)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.in.Close()
		_ = r.cmd.Process.Kill()
		_ = r.cmd.Wait()
	})
	return r
}

// ask sends a command and returns the reply to it.
func (r *reader) ask(format string, a ...any) string {
	fmt.Fprintf(r.in, format+"\n", a...)
	line, err := r.out.ReadString('\n')
	if err != nil {
		return "reader died"
	}
	return strings.TrimSuffix(line, "\n")
}

// start is ask in the background.
func (r *reader) start(format string, a ...any) <-chan string {
	reply := make(chan string, 1)
	go func() { reply <- r.ask(format, a...) }()
	return reply
}

func (r *reader) want(want, format string, a ...any) {
	r.t.Helper()
	if got := r.ask(format, a...); got != want {
		r.t.Fatalf("%s: got %q, want %q", fmt.Sprintf(format, a...), got, want)
	}
}

// sum is what a reader replies when it has read p.
func sum(p []byte) string { return fmt.Sprintf("%x", sha256.Sum256(p)) }

// readerMain obeys commands until the end of in.
func readerMain(in io.Reader, out io.Writer) {
	var f *os.File
	for s := bufio.NewScanner(in); s.Scan(); {
		word, rest, _ := strings.Cut(s.Text(), " ")
		reply, err := "ok", error(nil)
		var a, b int64
		if word != "open" && word != "supported" {
			_, _ = fmt.Sscan(rest, &a, &b)
		}
		switch word {
		case "open":
			if f != nil {
				f.Close()
			}
			f, err = os.Open(rest)
		case "read":
			reply, err = readSum(f, a, b)
		case "mmap":
			reply, err = mmapSum(f, a, int(b))
		case "drop": // raises no event
			err = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
		case "truncate":
			err = os.Truncate(f.Name(), a)
		case "parallel": // a readers of the first b bytes, each starting elsewhere
			reply, err = parallelSum(f, int(a), b)
		case "latency": // median of a reads of 4 KiB, in ns
			reply, err = latency(f, int(a), b)
		case "supported":
			err = Supported(rest)
		}
		switch errno := syscall.Errno(0); {
		case err == nil:
		case word != "supported" && errors.As(err, &errno):
			reply = unix.ErrnoName(errno)
		default:
			reply = err.Error()
		}
		fmt.Fprintln(out, reply)
	}
}

func readSum(f *os.File, off, n int64) (string, error) {
	p := make([]byte, n)
	m, err := f.ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	return sum(p[:m]), err
}

func mmapSum(f *os.File, off int64, n int) (string, error) {
	p, err := unix.Mmap(int(f.Fd()), off, n, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return "", err
	}
	defer unix.Munmap(p)
	return sum(p), nil
}

func parallelSum(f *os.File, readers int, size int64) (string, error) {
	const step = 12 << 10
	sums, errs := make([]string, readers), make([]error, readers)
	var wg sync.WaitGroup
	for i := range readers {
		wg.Go(func() {
			p := make([]byte, size)
			steps := (size + step - 1) / step
			for j := range steps {
				off := (j*7 + int64(i)*13) % steps * step // 7 is prime to the number of steps
				if _, err := f.ReadAt(p[off:min(off+step, size)], off); err != nil {
					errs[i] = err
					return
				}
			}
			sums[i] = sum(p)
		})
	}
	wg.Wait()
	slices.Sort(sums)
	return strings.Join(slices.Compact(sums), " "), errors.Join(errs...)
}

func latency(f *os.File, rounds int, size int64) (string, error) {
	p := make([]byte, 4096)
	took := make([]time.Duration, rounds)
	for i := range took {
		off := int64(i) * 4096 % size
		start := time.Now()
		if _, err := f.ReadAt(p, off); err != nil {
			return "", err
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	return fmt.Sprint(took[rounds/2].Nanoseconds()), nil
}
