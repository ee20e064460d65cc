package e2e

import (
	"net/http"
	"testing"
	"time"

	"github.com/erofsd/erofsd/kernel-tests/services"
)

// outages stops servers and starts them again while readers read.
func (w *world) outages(t *testing.T) {
	for name, run := range map[string]func(t *testing.T){
		"pull-through-mirror": w.mirrorOutage, "squid-plain": w.squidPlain, "squid-connect": w.squidConnect,
		"registry": w.registryOutage, "registry-for-long": w.longOutage,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t)
		})
	}
}

// mirrorOutage reads through docker-registry as a pull-through mirror. It answers the first
// request for a range of a blob with all of the blob.
func (w *world) mirrorOutage(t *testing.T) {
	origin := w.seeded(t, services.RegistryOptions{})
	mirror := services.Registry(t, services.RegistryOptions{Upstream: "http://" + origin.Addr})
	m := w.start(t)
	point := m.mount(t, "registry", at(origin.Addr, "http", object{"mirrors": []object{
		{"host": "http://" + mirror.Addr, "ping_url": "http://" + mirror.Addr + "/v2/", "health_check_interval": 1, "failure_limit": 2},
	}}))
	l := w.load(t, point)
	l.await(t, 15)
	mirror.Kill()
	l.await(t, 25)
	m.awaitLog(t, 0, "mirror is unhealthy", bound)
	mirror.Start(t)
	l.await(t, 1)
	l.wait(t, 10*time.Second)
	m.whole(t, point)
	m.awaitLog(t, 0, "mirror recovered", bound)
}

// viaSquid stops squid under load, which the origin bridges, and starts it again.
func (w *world) viaSquid(t *testing.T, origin *services.Process, scheme, line string, more object) {
	t.Helper()
	squid := services.Squid(t)
	m := w.start(t)
	keys := at(origin.Addr, scheme, more, object{"proxy": object{"url": "http://" + squid.Addr, "check_interval": 1, "fallback": true}})
	point := m.mount(t, "registry", keys)
	l := w.load(t, point)
	l.await(t, 15)
	squid.Kill()
	l.await(t, 25)
	m.awaitLog(t, 0, "fallback to the origin", bound)
	squid.Start(t)
	l.await(t, 1)
	l.wait(t, 10*time.Second)
	m.whole(t, point)
	// A new image asks the proxy again.
	again := w.start(t)
	again.whole(t, again.mount(t, "registry", keys))
	again.end(t)
	squid.Stop()
	if n := squid.Served(t, line); n == 0 {
		t.Error("squid served nothing")
	}
}

func (w *world) squidPlain(t *testing.T) {
	origin := w.seeded(t, services.RegistryOptions{Login: true})
	w.viaSquid(t, origin, "http", http.MethodGet+" http://"+origin.Addr+"/v2/"+repo+"/blobs/", object{"auth": services.Auth()})
}

func (w *world) squidConnect(t *testing.T) {
	ca := services.NewCA(t)
	origin := w.seeded(t, services.RegistryOptions{TLS: ca})
	w.viaSquid(t, origin, "https", http.MethodConnect+" "+origin.Addr, object{"ca_cert_files": []string{ca.File}})
}

// registryOutage takes away the only source for less time than retries bridge.
func (w *world) registryOutage(t *testing.T) {
	reg := w.seeded(t, services.RegistryOptions{})
	m := w.start(t)
	point := m.mount(t, "registry", at(reg.Addr, "http", object{"retry_limit": 10}))
	l := w.load(t, point)
	l.await(t, 10)
	reg.Kill()
	time.Sleep(2 * time.Second)
	reg.Start(t)
	l.wait(t, 20*time.Second)
	m.whole(t, point)
}

// longOutage takes it away for longer: reads fail in time, and work again soon after it is
// back.
func (w *world) longOutage(t *testing.T) {
	reg := w.seeded(t, services.RegistryOptions{})
	m := w.start(t)
	keys := at(reg.Addr, "http", object{"retry_limit": 2})
	point := m.mount(t, "registry", keys)
	names := w.files("data/")
	m.mustRead(t, point, names[:5]...)
	reg.Kill()
	for _, name := range names[40:46] {
		m.mustFail(t, point, name)
	}
	m.mustRead(t, point, names[:5]...) // is there
	m.again(t)                         // with what there is
	m.w.start(t).refused(t, "registry", keys, "connection refused")
	point = m.mount(t, "registry", keys)
	m.mustRead(t, point, names[:5]...)
	m.mustFail(t, point, names[40])
	reg.Start(t)
	m.recovers(t, point, names[40])
	m.whole(t, point)
}
